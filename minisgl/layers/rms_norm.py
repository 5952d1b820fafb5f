"""RMS norm over the hidden size, with the residual addition before it."""

import torch

from minisgl.kernels.rms_norm import rms_norm
from minisgl.layers import Empty, Target
from minisgl.parallel import ParallelGroup


class RMSNorm:
    """weight  # [D]."""

    def __init__(self, empty: Empty, size: int, eps: float):
        self.weight = empty(size)
        self.eps = eps

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, residual  # [T, D] -> [T, D]. With a residual: adds x, or its parts  # [S, T, D], to it in place and
        normalises the sum."""
        return rms_norm(x, self.weight, self.eps, residual)

    def targets(self) -> dict[str, Target]:
        return {"weight": Target.uncut(self.weight)}


class SummedRMSNorm(RMSNorm):
    """The same behind layers that are cut over ranks: what is added to the residual is the sum of the ranks' x."""

    def __init__(self, empty: Empty, size: int, eps: float, group: ParallelGroup):
        super().__init__(empty, size, eps)
        self.group = group

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, residual  # [T, D] -> [T, D]. With a residual x is a part, and may be overwritten."""
        if residual is None:
            return super().__call__(x)
        return self.group.sum_and_norm(x, residual, self.weight, self.eps)
