"""Logits -> token ids and logprobs, where each rank of a group has the logits of its slice of the vocabulary.

Ranks exchange what the kernels of `kernels.sharded_bounds`, `sharded_thresholds` and `sharded_draws` find in their
slices: a few numbers a row, never logits. All come to the same ids, at any number of ranks those of one.

Knows the group and the slice. Does not know requests.
"""

import torch

from minisgl.kernels.logprobs import logprobs
from minisgl.kernels.sampling import sample
from minisgl.kernels.sharded_bounds import Samples, Slice, bounds
from minisgl.kernels.sharded_draws import choose, draw
from minisgl.kernels.sharded_thresholds import num_passes, tally
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
            return sample(logits, rows, positions, temperature, top_k, top_p, min_p, seed, tokens=tokens)
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

    def logprobs(
        self, logits: torch.Tensor, ids: torch.Tensor, num_top: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logprobs of ids, the likeliest ids and their logprobs, as `kernels.logprobs.logprobs` has them, of logits
        # [N, V] of this rank's slice, whose padding is overwritten."""
        if self.group.size == 1:
            return logprobs(logits, ids, num_top)
        first_id, num_ids, _ = self.slice
        logits[:, num_ids:] = -torch.inf
        is_here = (ids >= first_id) & (ids < first_id + num_ids)
        of_ids, top_ids, top = logprobs(logits, torch.where(is_here, ids - first_id, 0), num_top)
        largest, mass = summarize_blocks(logits)
        log_mass = (largest + mass.log()).logsumexp(1)  # of the slice
        own = torch.where(is_here, of_ids, -torch.inf)[:, None]
        columns = (log_mass[:, None], own, top, torch.where(top_ids < 0, -1, top_ids + first_id).view(torch.float32))
        gathered = self.group.gather(torch.cat(columns, 1))  # [n, N, 2 + 2 * num_top]
        log_masses = gathered[..., :1]
        correction = torch.where(log_masses > -torch.inf, log_masses - log_masses.logsumexp(0), 0)
        every = (gathered[..., 2 : 2 + num_top] + correction).movedim(0, 1).flatten(1)  # [N, n * num_top]
        every_id = gathered[..., 2 + num_top :].contiguous().view(torch.int32).movedim(0, 1).flatten(1)
        best, order = every.sort(dim=1, descending=True, stable=True)  # of equal ones the smallest id first
        top_ids = every_id.gather(1, order[:, :num_top])
        return (gathered[..., 1:2] + correction).amax(0).squeeze(1), top_ids, best[:, :num_top]
