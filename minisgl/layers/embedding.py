"""Token ids to vectors."""

import torch

from minisgl.kernels.embedding import embedding, embedding_stream
from minisgl.kernels.skinny_matmul import Stream
from minisgl.layers import Empty, Target
from minisgl.layers.rms_norm import RMSNorm
from minisgl.parallel import ParallelGroup
from minisgl.shards import Cut


class Embedding:
    """weight  # [V, hidden]: the rows of this rank's ids, from `first_id` on."""

    def __init__(self, empty: Empty, vocab: Cut, first_id: int, hidden_size: int, group: ParallelGroup):
        self.vocab, self.first_id, self.group = vocab, first_id, group
        self.weight = empty(vocab.size, hidden_size)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids  # [T] int32 -> [T, hidden]."""
        return self.group.sum(embedding(ids, self.weight, self.first_id))

    def stream(self, ids: torch.Tensor, norm: RMSNorm) -> Stream:
        """ids  # [T] int32 -> the residual stream that `norm` reads."""
        if self.group.size == 1:
            return embedding_stream(ids, self.weight, norm.weight, norm.eps)
        part = embedding(ids, self.weight, self.first_id)
        return self.group.sum_into_stream(part, None, norm.weight, norm.eps)

    def targets(self) -> dict[str, Target]:
        return {"weight": Target(self.weight, self.vocab)}
