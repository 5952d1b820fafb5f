"""Token ids to vectors."""

import torch

from minisgl.kernels.embedding import embedding
from minisgl.layers import Empty


class Embedding:
    """weight  # [V, hidden]."""

    def __init__(self, empty: Empty, vocab_size: int, hidden_size: int):
        self.weight = empty(vocab_size, hidden_size)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids  # [T] int32 -> [T, hidden]."""
        return embedding(ids, self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}
