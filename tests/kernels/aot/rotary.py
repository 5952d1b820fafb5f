import torch

from minisgl.kernels.rotary import rotary_store


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, kv_heads, head_dim in ((14, 2, 64), (32, 32, 80), (32, 32, 96), (32, 8, 128), (16, 8, 256)):
            for norm in (None, torch.empty(head_dim, dtype=dtype)):
                cache = torch.empty(1, 64, kv_heads, head_dim, dtype=dtype)
                rotary_store(
                    torch.empty(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
                    torch.empty(4, dtype=torch.int32),
                    torch.empty(4, dtype=torch.int32),
                    torch.empty(8, head_dim),
                    cache,
                    cache,
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    q_norm=norm,
                    k_norm=norm,
                    eps=1e-6,
                )
