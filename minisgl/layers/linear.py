"""y = x W^T + b, with several checkpoint matrices stacked into one weight so that they cost one launch."""

from collections.abc import Mapping

import torch

from minisgl.kernels.skinny_matmul import matmul
from minisgl.layers import Empty


class Linear:
    """weight  # [O, I], bias  # [O]. `parts` are the checkpoint's matrices and their rows: O is the sum."""

    def __init__(self, empty: Empty, in_features: int, parts: Mapping[str, int], *, bias: bool):
        self.parts = parts
        self.weight = empty(sum(parts.values()), in_features)
        self.bias = empty(sum(parts.values())) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x  # [T, I] -> [T, O]."""
        return matmul(x, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        found, start = {}, 0
        for part, rows in self.parts.items():
            found[f"{part}.weight"] = self.weight[start : start + rows]
            if self.bias is not None:
                found[f"{part}.bias"] = self.bias[start : start + rows]
            start += rows
        return found
