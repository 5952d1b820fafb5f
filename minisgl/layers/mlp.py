"""The gated feed-forward block: down(silu(gate(x)) * up(x)). Source: Shazeer, "GLU Variants", arXiv:2002.05202."""

import torch

from minisgl.kernels.silu_mul import silu_mul
from minisgl.kernels.skinny_matmul import Stream
from minisgl.layers import Empty
from minisgl.layers.linear import Linear
from minisgl.layers.rms_norm import RMSNorm
from minisgl.models.config import ModelConfig


class MLP:
    """Two matmuls; gate and up are one."""

    def __init__(self, empty: Empty, config: ModelConfig):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(empty, hidden, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias)
        self.down = Linear(empty, inner, {"down_proj": hidden}, bias=config.mlp_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x  # [T, hidden] -> [T, hidden]."""
        return self.down(silu_mul(self.gate_up(x)))

    def decode(self, stream: Stream, norm_after: RMSNorm) -> Stream:
        """The same for few tokens, added to the stream that `norm_after` reads."""
        return self.down.into_stream(stream, self.gate_up.of_stream(stream, gated=True), norm_after)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.gate_up.tensors() | self.down.tensors()
