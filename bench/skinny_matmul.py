"""Decode's matmuls at the shapes of Qwen3-0.6B and 8B, bf16, each launch with another copy of the weight."""

from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.kernels.skinny_matmul import skinny_matmul

# N, K of qkv, o, gate and up, down of each model; the LM head of the small one.
SHAPES = (
    (4096, 1024),
    (1024, 2048),
    (6144, 1024),
    (1024, 3072),
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (151936, 1024),
)
COPIES_BYTES = 256 << 20  # several times an L2 cache: in a graph of many launches too, weights come from memory


def cases(device: torch.device) -> Iterator[Case]:
    for outputs, inputs in SHAPES:
        copies = max(2, -(-COPIES_BYTES // (2 * outputs * inputs)))
        weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        for rows in (1, 4, 16):
            yield _case(torch.randn(rows, inputs, dtype=torch.bfloat16, device=device), weights)


def _case(x: torch.Tensor, weights: list[torch.Tensor]) -> Case:
    rows, (outputs, inputs) = x.shape[0], weights[0].shape
    ours, torchs = cycle(weights), cycle(weights)
    return Case(
        op="skinny_matmul",
        shape=f"{rows} x {inputs} -> {outputs}",
        run=lambda: skinny_matmul(x, next(ours)),
        baselines={"torch": lambda: F.linear(x, next(torchs))},
        bytes_moved=weights[0].nbytes + x.nbytes + rows * outputs * x.itemsize,
        flops=2 * rows * outputs * inputs,
    )
