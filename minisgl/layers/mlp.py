"""The gated feed-forward block: down(silu(gate(x)) * up(x)). Source: Shazeer, "GLU Variants", arXiv:2002.05202."""

import torch

from minisgl.kernels.skinny_matmul import Stream
from minisgl.layers import Empty, Target
from minisgl.layers.linear import Linear, SummedLinear
from minisgl.layers.ops import Ops
from minisgl.layers.rms_norm import RMSNorm
from minisgl.models.config import ModelConfig
from minisgl.parallel import ParallelGroup
from minisgl.shards import Shard


class MLP:
    """Two matmuls; gate and up are one. A rank computes a slice of the inner width, and a part of the sum over it."""

    def __init__(self, empty: Empty, config: ModelConfig, shard: Shard, group: ParallelGroup, ops: Ops):
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_up = Linear(empty, hidden, {"gate_proj": shard.mlp, "up_proj": shard.mlp}, ops, bias=bias)
        self.down = SummedLinear(empty, shard.mlp, "down_proj", hidden, group, ops, bias=bias)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """x, residual  # [T, hidden] -> what is to be added to the residual, as from `SummedLinear`."""
        return self.down(self.gate_up.gated(x), residual)

    def decode(self, stream: Stream, norm_after: RMSNorm) -> Stream:
        """The same for few tokens, added to the stream that `norm_after` reads."""
        return self.down.into_stream(stream, self.gate_up.of_stream(stream, gated=True), norm_after)

    def targets(self) -> dict[str, Target]:
        return self.gate_up.targets() | self.down.targets()
