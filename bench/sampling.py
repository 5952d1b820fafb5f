"""Sampling at Qwen3's vocabulary, bf16 logits.

Normal logits: with `qwen3`'s settings the first list of blocks suffices; `wide` keeps thousands of tokens, and all
blocks are searched.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch

from minisgl.bench.attention_baselines import lazily
from minisgl.bench.harness import Case
from minisgl.kernels.sampling import sample

VOCAB = 151_936
KINDS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "qwen3": (0.6, 20, 0.95, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
    "wide": (1.0, 0, 0.98, 0.0),
}


def cases(device: torch.device) -> Iterator[Case]:
    for samples in (1, 32, 64, 256):
        logits = (torch.randn(samples, VOCAB, device=device) * 3).bfloat16()
        for kind in KINDS:
            yield _case(kind, logits)


def _case(kind: str, logits: torch.Tensor) -> Case:
    samples, device = len(logits), logits.device
    temperature, top_k, top_p, min_p = KINDS[kind]
    rows = torch.arange(samples, dtype=torch.int32, device=device)
    tables = (
        torch.full((samples,), temperature, device=device),
        torch.full((samples,), top_k, dtype=torch.int32, device=device),
        torch.full((samples,), top_p, device=device),
        torch.full((samples,), min_p, device=device),
        torch.arange(samples, device=device),
    )
    return Case(
        op="sampling",
        shape=f"{samples} x {VOCAB}, {kind}",
        run=lambda: sample(logits, rows, rows, *tables),
        baselines={"torch": _baseline(kind, logits), **_flashinfer(kind, logits)},
        bytes_moved=logits.nbytes,
    )


def _baseline(kind: str, logits: torch.Tensor) -> Callable[[], object]:
    temperature, top_k, top_p, min_p = KINDS[kind]

    def greedy() -> torch.Tensor:
        return logits.argmax(-1)

    def draw() -> torch.Tensor:
        x = logits.float() / temperature
        ids = None
        if top_k or top_p < 1:
            x, ids = x.topk(top_k) if top_k else x.sort(descending=True)
        probabilities = x.softmax(-1)
        if top_p < 1:
            above = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(above >= top_p, 0)
        if min_p > 0:
            floor = min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < floor, 0)
        drawn = torch.multinomial(probabilities, 1)
        return drawn if ids is None else ids.gather(1, drawn)

    return greedy if temperature == 0 else draw


def _flashinfer(kind: str, logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    """FlashInfer's sampling of the same kind, where it is installed; it reads fp32 logits that are divided already."""
    temperature, top_k, top_p, min_p = KINDS[kind]
    if temperature == 0 or min_p > 0 or not find_spec("flashinfer"):
        return {}

    def build() -> Callable[[], object]:
        flashinfer = import_module("flashinfer.sampling")
        x = logits.float() / temperature
        if not top_k and top_p == 1:
            return lambda: flashinfer.sampling_from_logits(x)
        return lambda: flashinfer.top_k_top_p_sampling_from_logits(x, top_k or logits.shape[1], top_p)

    return {"FlashInfer": lazily(build)}
