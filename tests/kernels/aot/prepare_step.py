import torch

from minisgl.kernels.prepare_step import prepare_step


def launch() -> None:
    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    for page_size in (16, 32, 64, 128, 256):
        prepare_step(ints(4), ints(4), ints(5), ints(4), ints(100), 60, ints(8, 512), ints(8), ints(8, 32), page_size)
