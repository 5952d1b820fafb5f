"""SwiGLU's gate at the intermediate sizes of Qwen3-0.6B and 8B, bf16."""

from collections.abc import Iterator

import torch

from minisgl.bench.harness import Case
from minisgl.kernels.silu_mul import silu_mul, silu_mul_reference


def cases(device: torch.device) -> Iterator[Case]:
    for intermediate in (3072, 12288):
        for tokens in (1, 64, 256, 8192):
            yield _case(tokens, intermediate, device)


def _case(tokens: int, intermediate: int, device: torch.device) -> Case:
    x = torch.randn(tokens, 2 * intermediate, dtype=torch.bfloat16, device=device)
    return Case(
        op="silu_mul",
        shape=f"{tokens} x {intermediate}",
        run=lambda: silu_mul(x),
        baselines={"torch": lambda: silu_mul_reference(x)},
        bytes_moved=x.nbytes * 3 // 2,
    )
