import torch

from minisgl.kernels.sharded_draws import choose, draw
from minisgl.kernels.sharded_thresholds import WAYS, Search
from tests.kernels.sharded_ranks import compiled_ahead


def launch() -> None:
    tokens = torch.empty(5, 64, dtype=torch.int32)
    for ranks, logits, of, samples in compiled_ahead():
        blocks = logits.shape[1] // 64
        largest, mass = torch.empty(2, 3, blocks)
        all_bounds, last = torch.empty(ranks, 3, 3), torch.empty(ranks, 3, WAYS)
        keys, goal = torch.empty(3, 2, dtype=torch.int64), torch.empty(3)
        search = Search(keys, goal, *(torch.empty(size, dtype=torch.int32) for size in ((3, blocks), 3)))
        draw(logits, of, samples, largest, mass, all_bounds, search, last)
        draw(logits, of, samples, largest, mass, all_bounds, None, None)
        choose(torch.empty(ranks, 3, 2, dtype=torch.int32), samples, tokens)
