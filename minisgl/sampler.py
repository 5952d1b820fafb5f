"""Logits -> token ids, where each rank of a group has the logits of its slice of the vocabulary.

Ranks exchange what `kernels.sharded_sampling` finds in their slices: a few numbers a row, never logits. All come to the
same ids, at any number of ranks those of one. Knows the group and the slice. Does not know requests.
"""

import torch

from minisgl.kernels.sampling import sample
from minisgl.kernels.sharded_sampling import Samples, Slice, bounds, choose, draw, num_passes, tally
from minisgl.kernels.vocab_blocks import summarize_blocks
from minisgl.parallel import ParallelGroup
from minisgl.shards import Shard


class Sampler:
    """Samples for a group of ranks; one rank alone calls `kernels.sampling.sample`."""

    def __init__(self, shard: Shard, group: ParallelGroup) -> None:
        self.group = group
        self.slice = Slice(shard.first_id, shard.vocab.num_real, shard.vocab.whole)

    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seed: torch.Tensor,
        tokens: torch.Tensor | None = None,
        *,
        filters: bool = True,
    ) -> torch.Tensor:
        """Ids  # [N] int32 of logits  # [N, V] of this rank's slice; the other arguments as `kernels.sampling.sample`
        has them. filters: whether any row may have top-k, top-p or min-p; the same on all ranks."""
        if self.group.size == 1:
            return sample(logits, rows, positions, temperature, top_k, top_p, min_p, seed, tokens)
        samples = Samples(rows, positions, temperature, top_k, top_p, min_p, seed)
        if not len(logits):
            return rows
        largest, mass = summarize_blocks(logits, rows, temperature, self.slice.num_ids)
        all_bounds = self.group.gather(bounds(largest, mass, logits, self.slice, samples))
        search, last = None, None
        for by_mass in (False, True) if filters else ():
            for number in range(num_passes(logits.dtype)):
                search, found = tally(
                    logits,
                    self.slice,
                    samples,
                    largest,
                    all_bounds,
                    search,
                    last,
                    by_mass=by_mass,
                    first=number == 0,
                )
                last = self.group.gather(found)
        draws = draw(logits, self.slice, samples, largest, mass, all_bounds, search, last)
        return choose(self.group.gather(draws), samples, tokens)
