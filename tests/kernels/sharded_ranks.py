"""Ranks that each have a slice of the logits, as threads of one process; arguments of the sharded kernels."""

import threading

import torch

from minisgl.kernels.sampling import sample
from minisgl.kernels.sharded_bounds import Samples, Slice
from minisgl.parallel import ParallelGroup
from minisgl.sampler import Sampler
from minisgl.shards import Cut, Ranks, Shard

ROWS = 16
NO_CUT = Cut.none(1)


class LockstepGroup(ParallelGroup):
    """Ranks that are threads, of which one runs at a time: the interpreter knows no other."""

    def __init__(self, ranks, condition, parts):
        self.ranks = ranks
        self._condition, self._parts = condition, parts

    def gather(self, x):
        round_parts = self._parts.setdefault(self._round, {})
        self._round += 1
        round_parts[self.ranks.rank] = x
        self._condition.notify_all()
        assert self._condition.wait_for(lambda: len(round_parts) == self.size, timeout=60)
        return torch.stack([round_parts[rank] for rank in range(self.size)])

    _round = 0


def on_ranks(logits, num_ranks, run_one):
    """run_one(sampler, slice of the logits) of each of several ranks."""
    condition, parts, results = threading.Condition(), {}, {}

    def run(rank):
        ranks = Ranks(rank, num_ranks)
        shard = Shard(ranks, NO_CUT, NO_CUT, NO_CUT, Cut.slices(logits.shape[1], ranks, 64))
        own = logits.new_full((len(logits), shard.vocab.size), 99)  # what pads a slice must not be drawn
        own[:, : shard.vocab.num_real] = logits[:, shard.first_id : shard.first_id + shard.vocab.num_real]
        with condition:
            results[rank] = run_one(Sampler(shard, LockstepGroup(ranks, condition, parts)), own)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(num_ranks)]


def sample_in_slices(logits, num_ranks, arguments, tokens, filters=True):
    """The ids and tokens that each of several ranks comes to."""

    def run_one(sampler, own):
        written = tokens.clone()
        return sampler(own, *arguments, written, filters=filters), written

    return on_ranks(logits, num_ranks, run_one)


def asked(device, *, filters):
    """Every kind of row: greedy, plain, each filter alone, all together, and padding."""
    off = (1.0, 0, 1.0, 0.0)
    rows = [(0.0, 0, 1.0, 0.0), off, (0.3, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0)]
    if filters:
        rows += [(1.0, 1, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.5, 300, 1.0, 0.0), (1.0, 0, 0.5, 0.0)]
        rows += [(1.3, 0, 0.95, 0.0), (1.0, 0, 1.0, 0.1), (0.7, 20, 0.8, 0.05), (5.0, 0, 0.99, 0.0), (0.0, 5, 0.5, 0.2)]
        rows += [(1.0, 10**6, 0.9, 0.0), (1.0, 40, 0.0, 0.0)]
    table = [rows[n % len(rows)] for n in range(ROWS)]
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*table, strict=True))
    seed = torch.arange(ROWS, dtype=torch.int64, device=device) * 7919 + 3
    tables = (
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        seed,
    )
    numbers = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).int()
    numbers[3] = -1
    positions = torch.arange(ROWS, dtype=torch.int32) * 3 % 50
    return numbers.to(device), positions.to(device), *tables


def check_equals_one_rank(num_ranks, vocab, dtype, device, *, filters):
    """All ranks come to the ids that `sample` has of all logits, broken and equal ones among them."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(ROWS, vocab, generator=generator)).to(dtype).to(device)
    logits[5, 7], logits[6, vocab - 1], logits[7] = torch.nan, torch.inf, -torch.inf
    logits[8] = logits[8].round()  # many ties
    logits[9, : vocab // 2] = -torch.inf
    arguments = asked(device, filters=filters)
    tokens = torch.full((ROWS, 64), -7, dtype=torch.int32, device=device)
    expected_tokens = tokens.clone()
    expected = sample(logits, *arguments, expected_tokens)
    for ids, written in sample_in_slices(logits, num_ranks, arguments, tokens, filters):
        assert ids.tolist() == expected.tolist()
        assert torch.equal(written, expected_tokens)


def compiled_ahead():
    """(number of ranks, logits, slice, samples) of the shapes that are compiled ahead of time."""
    index, table = torch.empty(3, dtype=torch.int32), torch.empty(5)
    top_k, seed = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
    samples = Samples(index, index, table, top_k, table, table, seed)
    for ranks, dtype, size in ((2, torch.bfloat16, 75968), (4, torch.float32, 512)):
        yield ranks, torch.empty(3, size, dtype=dtype), Slice(0, size - 1, ranks * size), samples
