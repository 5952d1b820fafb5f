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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """The same of the residual  # [T, D], to which x, or its parts  # [S, T, D], are added in place first."""
        return self(residual) if x is None else rms_norm(x, self.weight, self.eps, residual)

    def targets(self) -> dict[str, Target]:
        return {"weight": Target.uncut(self.weight)}


class SummedRMSNorm(RMSNorm):
    """The same behind layers that are cut over ranks: what is added to the residual is the sum of the ranks' x."""

    def __init__(self, empty: Empty, size: int, eps: float, group: ParallelGroup):
        super().__init__(empty, size, eps)
        self.group = group

    def of_sum(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """x is this rank's part of the sum, and may be overwritten."""
        assert x is not None
        return self.group.sum_and_norm(x, residual, self.weight, self.eps)
