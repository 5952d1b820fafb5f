"""Token ids to vectors."""

import torch

from minisgl.kernels.embedding import embedding, embedding_stream
from minisgl.kernels.skinny_matmul import Stream
from minisgl.layers import Empty
from minisgl.layers.rms_norm import RMSNorm


class Embedding:
    """weight  # [V, hidden]."""

    def __init__(self, empty: Empty, vocab_size: int, hidden_size: int):
        self.weight = empty(vocab_size, hidden_size)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids  # [T] int32 -> [T, hidden]."""
        return embedding(ids, self.weight)

    def stream(self, ids: torch.Tensor, norm: RMSNorm) -> Stream:
        """ids  # [T] int32 -> the residual stream that `norm` reads."""
        return embedding_stream(ids, self.weight, norm.weight, norm.eps)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}
