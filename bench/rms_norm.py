"""RMS norm at the hidden sizes of Qwen3-0.6B and 8B, bf16."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.kernels.rms_norm import rms_norm

EPS = 1e-6


def cases(device: torch.device) -> Iterator[Case]:
    for hidden in (1024, 4096):
        for tokens in (1, 64, 256, 8192):
            for with_residual in (False, True):
                yield _case(tokens, hidden, with_residual, device)


def _case(tokens: int, hidden: int, with_residual: bool, device: torch.device) -> Case:
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
    weight = torch.randn(hidden, dtype=torch.bfloat16, device=device)
    residual = torch.randn_like(x) if with_residual else None

    def baseline() -> torch.Tensor:
        return F.rms_norm(x if residual is None else residual.add_(x), (hidden,), weight, EPS)

    return Case(
        op="rms_norm",
        shape=f"{tokens} x {hidden}" + ", residual" * with_residual,
        run=lambda: rms_norm(x, weight, EPS, residual),
        baselines={"torch": baseline},
        bytes_moved=(4 if with_residual else 2) * x.nbytes,
    )
