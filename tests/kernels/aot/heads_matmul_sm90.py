import torch

from minisgl.kernels.paged import SHARED_MEMORY
from minisgl.kernels.rotary import Rotary

ARCHITECTURES = ["sm_90"]
HEADS = ((16, 8, 128, True, False), (28, 4, 128, False, True), (14, 2, 64, False, True))  # ..., norms, biases


def launch() -> None:
    from minisgl.kernels import heads_matmul_sm90 as module

    for dtype in (torch.bfloat16, torch.float16):
        for heads in HEADS:
            launch_heads(module, torch.empty(64, 1024, dtype=dtype), *heads)
    for compiled in module._heads_matmul.device_caches[0][0].values():
        shared = compiled.metadata.shared
        assert shared <= SHARED_MEMORY["sm_90"], f"{shared} of {SHARED_MEMORY['sm_90']} bytes of shared memory"


def launch_heads(module, x, heads, kv_heads, head_dim, with_norm, with_bias) -> None:
    weight = x.new_empty((heads + 2 * kv_heads) * head_dim, x.shape[1])
    tokens, cache = torch.empty(len(x), dtype=torch.int32), x.new_empty(2, 64, kv_heads, head_dim)
    norm = x.new_empty(head_dim) if with_norm else None
    bias = x.new_empty(len(weight)) if with_bias else None
    rotary = Rotary(torch.empty(8, head_dim), norm, norm, 1e-6)
    module.heads_matmul(x, weight, bias, tokens, tokens, cache, cache, rotary)
