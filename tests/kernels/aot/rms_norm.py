import torch

from minisgl.kernels.rms_norm import early_tokens, rms_norm


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in (256, 1000, 1024, 4096, 5120, 8192) if dtype == torch.bfloat16 else (1000,):
            x, weight = torch.empty(4, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
            rms_norm(x, weight, 1e-6)
            rms_norm(x, weight, 1e-6, torch.empty_like(x))
            rms_norm(torch.empty(8, 4, hidden, dtype=x.dtype), weight, 1e-6, torch.empty_like(x))
    x = torch.empty(early_tokens(1024) + 1, 1024, dtype=torch.bfloat16)
    rms_norm(x, x[0], 1e-6, torch.empty_like(x))
