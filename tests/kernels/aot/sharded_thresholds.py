import torch

from minisgl.kernels.sharded_thresholds import WAYS, tally
from tests.kernels.sharded_ranks import compiled_ahead


def launch() -> None:
    for ranks, logits, of, samples in compiled_ahead():
        largest, all_bounds = torch.empty(3, logits.shape[1] // 64), torch.empty(ranks, 3, 3)
        last = torch.empty(ranks, 3, WAYS)
        search, _ = tally(logits, of, samples, largest, all_bounds, None, None, by_mass=False, first=True)
        for by_mass, first in ((True, True), (False, False)) if ranks == 2 else ((True, False),):
            tally(logits, of, samples, largest, all_bounds, search, last, by_mass=by_mass, first=first)
