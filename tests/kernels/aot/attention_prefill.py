from collections.abc import Callable

import torch

from minisgl.kernels import attention_prefill as portable
from minisgl.kernels import attention_prefill_sm90 as sm90
from minisgl.kernels.attention_prefill import attention_prefill, attention_prefill_portable
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY


def launch() -> None:
    kernels = {"portable": portable._attention_prefill_kernel}
    for run in (attention_prefill, attention_prefill_portable):  # the same, unless this architecture has its own
        compile_one(run, torch.bfloat16, 64, page_size=16, window=4096, heads=7, kv_heads=1)
        compile_one(run, torch.bfloat16, 80)
        compile_one(run, torch.float16, 256, page_size=256)
        for head_dim in (64, 128, 256):
            compile_one(run, torch.float32, head_dim)
    arch = architecture(torch.device("cpu"))
    if arch == "sm_90":
        for page_size in (16, 32, 64, 256):
            compile_one(attention_prefill, torch.bfloat16, 128, page_size)
        compile_one(attention_prefill, torch.float16, 64)
        kernels["sm_90"] = sm90._attention_prefill_sm90
    for name, kernel in kernels.items():
        compiled = kernel.device_caches[0][0].values()
        assert compiled, f"no {name} kernel was compiled"
        for shared in (one.metadata.shared for one in compiled):
            assert shared <= SHARED_MEMORY[arch], f"{name}: {shared} of {SHARED_MEMORY[arch]} bytes of shared memory"


def compile_one(
    run: Callable[..., None],
    dtype: torch.dtype,
    head_dim: int,
    page_size: int = 64,
    window: int = 0,
    heads: int = 32,
    kv_heads: int = 8,
) -> None:
    q = torch.empty(2, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = torch.empty(1, page_size, kv_heads, head_dim, dtype=dtype)
    index = torch.zeros(2, dtype=torch.int32)
    run(
        q, cache, cache, index[None], index[:1], index, index[:1], index.repeat(2, 1),
        scale=1.0, window=window, out=torch.empty(q.shape, dtype=dtype),
    )  # fmt: skip
