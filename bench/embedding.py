"""Token embedding at the tables of Qwen3-0.6B and 8B, bf16."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.kernels.embedding import embedding

VOCAB = 151_936


def cases(device: torch.device) -> Iterator[Case]:
    for hidden in (1024, 4096):
        weight = torch.randn(VOCAB, hidden, dtype=torch.bfloat16, device=device)
        for tokens in (1, 64, 256, 8192):
            yield _case(tokens, weight)


def _case(tokens: int, weight: torch.Tensor) -> Case:
    ids = torch.randint(0, VOCAB, (tokens,), dtype=torch.int32, device=weight.device)
    return Case(
        op="embedding",
        shape=f"{tokens} x {weight.shape[1]}",
        run=lambda: embedding(ids, weight),
        baselines={"torch": lambda: F.embedding(ids, weight)},
        bytes_moved=2 * tokens * weight.shape[1] * weight.itemsize,
    )
