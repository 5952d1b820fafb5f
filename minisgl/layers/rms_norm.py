"""RMS norm over the hidden size, with the residual addition before it."""

import torch

from minisgl.kernels.rms_norm import rms_norm
from minisgl.layers import Empty


class RMSNorm:
    """weight  # [D]."""

    def __init__(self, empty: Empty, size: int, eps: float):
        self.weight = empty(size)
        self.eps = eps

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, residual  # [T, D] -> [T, D]. With a residual: adds x to it in place and normalises the sum."""
        return rms_norm(x, self.weight, self.eps, residual)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}
