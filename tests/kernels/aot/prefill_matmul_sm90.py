import torch

from minisgl.kernels.paged import SHARED_MEMORY
from tests.kernels.aot.heads_matmul_sm90 import HEADS, launch_heads

ARCHITECTURES = ["sm_90"]
ROWS = 512


def launch() -> None:
    from minisgl.kernels import prefill_matmul_sm90 as module

    for dtype in (torch.bfloat16, torch.float16):
        x = torch.empty(ROWS, 1024, dtype=dtype)
        weight = torch.empty(4096, 1024, dtype=dtype)
        for bias in (None, weight[:, 0].contiguous()):
            module.gated_matmul(x, weight, bias)
        for heads in HEADS:
            launch_heads(module, x, *heads)
    for kernel in (module._gated_matmul, module._heads_matmul):
        for compiled in kernel.device_caches[0][0].values():
            shared = compiled.metadata.shared
            assert shared <= SHARED_MEMORY["sm_90"], f"{shared} of {SHARED_MEMORY['sm_90']} bytes of shared memory"
