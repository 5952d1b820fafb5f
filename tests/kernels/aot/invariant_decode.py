import torch

from minisgl.kernels.invariant_decode import _invariant_decode_kernel, invariant_decode
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY


def launch() -> None:
    compile_one(torch.bfloat16, 64, page_size=16, window=4096)
    compile_one(torch.bfloat16, 80)
    compile_one(torch.float16, 256)
    for head_dim in (64, 128, 256):
        compile_one(torch.float32, head_dim)
    limit = SHARED_MEMORY[architecture(torch.device("cpu"))]
    for shared in (one.metadata.shared for one in _invariant_decode_kernel.device_caches[0][0].values()):
        assert shared <= limit, f"{shared} bytes of shared memory; {limit} are there"


def compile_one(dtype: torch.dtype, head_dim: int, page_size: int = 64, window: int = 0) -> None:
    heads, kv_heads = 32, 8
    q = torch.empty(2, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = torch.empty(1, page_size, kv_heads, head_dim, dtype=dtype)
    index = torch.zeros(2, dtype=torch.int32)
    out = torch.empty(q.shape, dtype=dtype)
    invariant_decode(q, cache, cache, index[None], index, index, 9000, scale=1.0, window=window, out=out)
