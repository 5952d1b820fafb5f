import torch

from minisgl.kernels.common_prefix import common_prefix_lengths


def launch() -> None:
    tokens = torch.empty(64, dtype=torch.int32)
    for dtype in (torch.int64, torch.int32):
        starts = torch.zeros(60, dtype=dtype)
        common_prefix_lengths(tokens, starts[:-1], tokens, starts[1:], torch.zeros(59, dtype=torch.int32))
