"""y = x W^T + b, with several checkpoint matrices stacked into one weight so that they cost one launch."""

from collections.abc import Mapping

import torch

from minisgl.kernels.skinny_matmul import Stream, matmul_into, normed_matmul
from minisgl.layers import Empty
from minisgl.layers.rms_norm import RMSNorm


class Linear:
    """weight  # [O, I], bias  # [O]. `parts` are the checkpoint's matrices and their rows: O is the sum."""

    def __init__(self, empty: Empty, in_features: int, parts: Mapping[str, int], *, bias: bool):
        self.parts = parts
        self.weight = empty(sum(parts.values()), in_features)
        self.bias = empty(sum(parts.values())) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x  # [T, I] -> [T, O]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def of_stream(self, stream: Stream, *, gated: bool = False) -> torch.Tensor:
        """The stream normed, times the weight  # [M, D] -> [M, O], or [M, O / 2] behind a gate; M is small."""
        return normed_matmul(stream, self.weight, self.bias, gated=gated)

    def into_stream(self, stream: Stream, x: torch.Tensor, norm: RMSNorm) -> Stream:
        """Add y of x  # [M, I] to the stream, which `norm` reads next; M is small."""
        return matmul_into(stream, x, self.weight, self.bias, norm.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        found, start = {}, 0
        for part, rows in self.parts.items():
            found[f"{part}.weight"] = self.weight[start : start + rows]
            if self.bias is not None:
                found[f"{part}.bias"] = self.bias[start : start + rows]
            start += rows
        return found
