"""The least time a device could take for a workload: what no engine of 2-byte weights and keys can beat.

    floor = prefill + decode matmuls + decode keys            one after another, as a stream of kernels runs them
    prefill          = max(weight bytes / copy rate, flops / matmul rate)     2 flops a weight and token, and
                       4 x heads x head dim flops a layer for each token that a token sees
    decode matmuls   = sum over steps of max(weight bytes / copy rate, 2 x weights x rows / matmul rate)
    decode keys      = sum over steps and rows of KV bytes / copy rate

All requests start together and none waits: step s has a row for each request with more than s tokens of output, the
first token coming from prefill. A prefix that requests share is computed once and read once a step, for all of them.
Only matrices count as weights; the token embedding is looked up, not read. The rates are the best that were measured.
"""

from itertools import pairwise

import numpy as np

from minisgl.bench.workloads import Workload
from minisgl.models.config import ModelConfig

BYTES = 2  # of an element


def floor_s(config: ModelConfig, work: Workload, copy_gb_s: float, matmul_tflops: float) -> float:
    """Seconds of the floor on a device with these rates."""
    copy, matmul = copy_gb_s * 1e9, matmul_tflops * 1e12
    head = config.vocab_size * config.hidden_size
    layers = config.num_layers * _layer_weights(config)
    weights = layers + head
    lens = np.array([len(prompt) for prompt in work.prompts])
    own = lens - _shared_lens(work.prompts)
    outputs = np.array(work.output_lens)

    seen = own * (lens - own) + own * (own + 1) // 2  # keys that a request's own prompt tokens see, together
    flops = 2 * layers * own.sum() + 2 * head * len(lens)
    flops += 4 * config.num_layers * config.num_heads * config.head_dim * seen.sum()
    prefill = max(BYTES * weights / copy, flops / matmul)

    rows = (outputs[:, None] > np.arange(1, outputs.max())).sum(0)  # [steps]
    matmuls = np.maximum(BYTES * weights / copy, 2 * weights * rows / matmul).sum()

    steps = outputs - 1
    keys = (steps * own + steps * (steps + 1) // 2).sum()  # a step's own key too
    key_bytes = 2 * BYTES * config.num_layers * config.num_kv_heads * config.head_dim
    return float(prefill + matmuls + keys * key_bytes / copy)


def _layer_weights(config: ModelConfig) -> int:
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def _shared_lens(prompts: list[list[int]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many first tokens of each prompt another one brings: its common prefix with the one before it in order."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shared = np.zeros(len(prompts), np.int64)
    for before, after in pairwise(order):
        pairs = zip(prompts[before], prompts[after], strict=False)
        shared[after] = next((place for place, (a, b) in enumerate(pairs) if a != b), len(prompts[before]))
    return shared
