from itertools import product

import torch

from minisgl.kernels import attention_decode as module
from minisgl.kernels.attention_decode import attention_decode, attention_decode_rotary
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY
from minisgl.kernels.rotary import Rotary


def launch() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        compile_one(torch.bfloat16, head_dim)
    for head_dim in (64, 128, 256):
        compile_one(torch.float32, head_dim)
    compile_one(torch.float16, 128)
    compile_one(torch.bfloat16, 128, window=4096)
    compile_one(torch.bfloat16, 128, page_size=16)
    for group in (7, 24, 128):
        compile_one(torch.bfloat16, 128, page_size=256, heads=group, kv_heads=1)
    many, module.MANY = module.MANY, 1
    for dtype, head_dim in product((torch.bfloat16, torch.float32), (64, 128, 256)):
        compile_plain(dtype, head_dim)
    compile_plain(torch.bfloat16, 128, page_size=16, window=4096)
    compile_plain(torch.bfloat16, 128, page_size=256, heads=16, kv_heads=1)
    module.MANY = many
    limit = SHARED_MEMORY[architecture(torch.device("cpu"))]
    for kernel in module._attention_decode_kernel.device_caches[0][0].values():
        assert kernel.metadata.shared <= limit, f"{kernel.metadata.shared} bytes of shared memory; {limit} are there"


def compile_plain(
    dtype: torch.dtype, head_dim: int, page_size: int = 64, window: int = 0, heads: int = 32, kv_heads: int = 8
) -> tuple[object, ...]:
    """Returns the pages, as both launchers take them."""
    q = torch.empty(2, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = torch.empty(1, page_size, kv_heads, head_dim, dtype=dtype)
    index = torch.zeros(2, dtype=torch.int32)
    pages = cache, cache, index[None], index, index, 9000
    attention_decode(q, *pages, scale=1.0, window=window, out=torch.empty(q.shape, dtype=dtype))
    return pages


def compile_one(
    dtype: torch.dtype, head_dim: int, page_size: int = 64, window: int = 0, heads: int = 32, kv_heads: int = 8
) -> None:
    pages = compile_plain(dtype, head_dim, page_size, window, heads, kv_heads)
    out = torch.empty(2, heads, head_dim, dtype=dtype)
    norm = torch.empty(head_dim, dtype=dtype)
    rotary = Rotary(torch.empty(9000, head_dim), norm, norm, 1e-6)
    qkv = torch.empty(2, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    attention_decode_rotary(qkv, *pages, rotary, scale=1.0, window=window, out=out)
