import torch

from minisgl.kernels import attention_cascade as module
from minisgl.kernels.attention_cascade import CascadeTiles, attention_cascade, tile_members
from minisgl.kernels.attention_decode import _attention_decode_kernel, attention_decode
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY
from tests.kernels.arithmetic import arithmetic


def launch() -> None:
    compile_one(torch.bfloat16, 64, page_size=16)
    compile_one(torch.bfloat16, 128)
    compile_one(torch.float16, 256, page_size=256, heads=7, kv_heads=1)
    for head_dim in (64, 128, 256):
        compile_one(torch.float32, head_dim)
    for group in (24, 64):
        compile_one(torch.bfloat16, 128, page_size=256, heads=group, kv_heads=1)


def compile_one(dtype: torch.dtype, head_dim: int, page_size: int = 64, heads: int = 32, kv_heads: int = 8) -> None:
    """Beside decode attention, whose bits it must give: the same matmul instructions, in the
    same layouts of sums."""
    qkv = torch.empty(2, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q = qkv.unflatten(1, (-1, head_dim))[:, :heads]
    cache = torch.empty(1, page_size, kv_heads, head_dim, dtype=dtype)
    index = torch.zeros(2, dtype=torch.int32)
    out = torch.empty(q.shape, dtype=dtype)
    paged = (cache, cache, index[None], index, index)
    together = tile_members(heads, kv_heads, dtype)
    tiles = CascadeTiles(index, index[:1], torch.zeros(1, together, dtype=torch.int32))
    workspace = (torch.empty(2, 9, heads, head_dim), torch.empty(2, 9, heads))
    kernels = (module._attention_cascade_kernel, _attention_decode_kernel)
    for kernel in kernels:
        kernel.device_caches[0][0].clear()
    attention_cascade(q, *paged, tiles, *workspace, scale=1.0)
    attention_decode(q, *paged, 9000, scale=1.0, out=out)
    cascade, decode = (next(iter(kernel.device_caches[0][0].values())) for kernel in kernels)
    limit = SHARED_MEMORY[architecture(torch.device("cpu"))]
    assert cascade.metadata.shared <= limit, f"{cascade.metadata.shared} bytes of shared memory; {limit} are there"
    assert arithmetic(cascade) == arithmetic(decode), f"sums differ: {dtype}, {head_dim}, {heads}/{kv_heads}"
