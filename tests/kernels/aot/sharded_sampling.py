import torch

from minisgl.kernels.sharded_sampling import WAYS, Samples, Slice, bounds, choose, draw, tally


def launch() -> None:
    index, table = torch.empty(3, dtype=torch.int32), torch.empty(5)
    top_k, seed = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
    samples, tokens = Samples(index, index, table, top_k, table, table, seed), torch.empty(5, 64, dtype=torch.int32)
    for ranks, dtype, size in ((2, torch.bfloat16, 75968), (4, torch.float32, 512)):
        logits, of = torch.empty(3, size, dtype=dtype), Slice(0, size - 1, ranks * size)
        largest, mass = torch.empty(2, 3, size // 64)
        all_bounds, last = torch.empty(ranks, 3, 3), torch.empty(ranks, 3, WAYS)
        bounds(largest, mass, logits, of, samples)
        search, _ = tally(logits, of, samples, largest, all_bounds, None, None, by_mass=False, first=True)
        for by_mass, first in ((False, False), (True, True), (True, False)):
            tally(logits, of, samples, largest, all_bounds, search, last, by_mass=by_mass, first=first)
        draw(logits, of, samples, largest, mass, all_bounds, search, last)
        draw(logits, of, samples, largest, mass, all_bounds, None, None)
        choose(torch.empty(ranks, 3, 2, dtype=torch.int32), samples, tokens)
