import torch

from minisgl.kernels.silu_mul import silu_mul


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for intermediate in (384, 1000, 3072, 12288, 18944) if dtype == torch.bfloat16 else (1000,):
            silu_mul(torch.empty(4, 2 * intermediate, dtype=dtype))
