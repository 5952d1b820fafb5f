"""y = x W^T + b, with several checkpoint matrices stacked into one weight so that they cost one launch."""

from collections.abc import Mapping

import torch

from minisgl.kernels.skinny_matmul import Stream, matmul_into, normed_matmul, skinny_matmul
from minisgl.layers import Empty, Target
from minisgl.layers.ops import Ops
from minisgl.layers.rms_norm import RMSNorm
from minisgl.parallel import ParallelGroup
from minisgl.shards import Cut


class Linear:
    """weight  # [O, I], bias  # [O]. `parts`: of each of the checkpoint's matrices this rank's rows; O is the sum."""

    def __init__(self, empty: Empty, in_features: int, parts: Mapping[str, Cut], ops: Ops, *, bias: bool):
        self.parts, self.ops = parts, ops
        rows = sum(cut.size for cut in parts.values())
        self.weight = empty(rows, in_features)
        self.bias = empty(rows) if bias else None

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """x  # [T, I] -> silu(first half of y) * second half  # [T, O / 2]."""
        return self.ops.gated(x, self.weight, self.bias)

    def of_stream(self, stream: Stream, *, gated: bool = False) -> torch.Tensor:
        """The stream normed, times the weight  # [M, D] -> [M, O], or [M, O / 2] behind a gate; M is small."""
        return normed_matmul(stream, self.weight, self.bias, gated=gated)

    def targets(self) -> dict[str, Target]:
        found, start = {}, 0
        for part, cut in self.parts.items():
            rows = slice(start, start + cut.size)
            found[f"{part}.weight"] = Target(self.weight[rows], cut)
            if self.bias is not None:
                found[f"{part}.bias"] = Target(self.bias[rows], cut)
            start += cut.size
        return found


class SummedLinear:
    """weight  # [O, I], bias  # [O]: I are this rank's inputs of the checkpoint's matrix `name`, and y is the sum over
    ranks, in which the first one counts the bias."""

    def __init__(
        self, empty: Empty, inputs: Cut, name: str, out_features: int, group: ParallelGroup, ops: Ops, *, bias: bool
    ):
        self.name, self.inputs, self.group, self.ops = name, inputs, group, ops
        self.weight = empty(out_features, inputs.size)
        self.bias = empty(out_features) if bias else None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """x  # [T, I] -> this rank's part of y  # [T, O]; or, of one rank alone, parts  # [S, T, O], or None where
        y is added to the residual  # [T, O] already. The norm that reads both adds what is returned."""
        if self.group.size == 1:
            return self.ops.add_linear(residual, x, self.weight, self.bias)
        return self.ops.linear(x, self.weight, self.bias)

    def into_stream(self, stream: Stream, x: torch.Tensor, norm: RMSNorm) -> Stream:
        """Add y of x  # [M, I] to the stream, which `norm` reads next; M is small."""
        if self.group.size == 1:
            return matmul_into(stream, x, self.weight, self.bias, norm.weight)
        part = skinny_matmul(x, self.weight, self.bias)
        return self.group.sum_into_stream(part, stream.residual, norm.weight, norm.eps)

    def targets(self) -> dict[str, Target]:
        found = {f"{self.name}.weight": Target(self.weight, self.inputs, dim=1)}
        if self.bias is not None:
            whole = Cut.none(len(self.bias))
            cut = whole if self.group.ranks.rank == 0 else Cut(whole.whole, whole.size, ())
            found[f"{self.name}.bias"] = Target(self.bias, cut)
        return found
