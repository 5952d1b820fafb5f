import torch

from minisgl.kernels.rotary import Rotary, rotary_store

SHAPES = ((14, 2, 64), (32, 32, 80), (32, 32, 96), (32, 8, 128), (16, 8, 256))  # heads, KV heads, head dim


def launch() -> None:
    for shape in SHAPES:
        compile_for(*shape, torch.bfloat16)
    compile_for(32, 8, 128, torch.float16)
    compile_for(4, 2, 64, torch.float32)


def compile_for(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = torch.empty(1, 64, kv_heads, head_dim, dtype=dtype)
    for norm in (None, torch.empty(head_dim, dtype=dtype)):
        rotary_store(
            torch.empty(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
            torch.empty(4, dtype=torch.int32),
            torch.empty(4, dtype=torch.int32),
            cache,
            cache,
            Rotary(torch.empty(8, head_dim), norm, norm, 1e-6),
        )
