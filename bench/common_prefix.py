"""Common prefixes of equal sequences, the longest work there is; in the last case one pair dwarfs the others."""

from collections.abc import Iterator

import torch

from minisgl.bench.harness import Case
from minisgl.kernels.common_prefix import common_prefix_lengths

SHAPES = {
    "1 x 131072": [131_072],
    "64 x 4096": [4096] * 64,
    "64 x 32768": [32_768] * 64,
    "1000 x 512": [512] * 1000,
    "1 x 100000 and 1000 x 64": [100_000] + [64] * 1000,
}


def cases(device: torch.device) -> Iterator[Case]:
    for shape, lengths in SHAPES.items():
        yield _case(shape, lengths, device)


def _case(shape: str, sizes: list[int], device: torch.device) -> Case:
    queries = torch.randint(0, 150_000, (sum(sizes),), dtype=torch.int32, device=device)
    keys = queries.clone()
    lengths = torch.tensor(sizes, dtype=torch.int32, device=device)  # equal pairs leave it as it is
    starts = lengths.cumsum(0) - lengths

    def baseline() -> torch.Tensor:
        """The first difference of one sequence as long as all: less work than finding one in each pair."""
        return (queries != keys).int().argmax()

    return Case(
        op="common_prefix",
        shape=shape,
        run=lambda: common_prefix_lengths(queries, starts, keys, starts, lengths),
        baselines={"torch, one pair": baseline},
        bytes_moved=2 * queries.nbytes,
    )
