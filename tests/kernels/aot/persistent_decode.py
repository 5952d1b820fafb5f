import torch

from minisgl.kernels import attention_decode as plain
from minisgl.kernels import persistent_decode as module
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY
from tests.kernels.aot.attention_decode import compile_plain


def launch() -> None:
    many, plain.MANY = plain.MANY, 1
    for head_dim in (64, 80, 96, 128, 256):
        compile_plain(torch.bfloat16, head_dim)
    for head_dim in (64, 128, 256):
        compile_plain(torch.float32, head_dim)
    compile_plain(torch.bfloat16, 128, window=4096)
    compile_plain(torch.bfloat16, 128, page_size=16)
    for group in (7, 16):
        compile_plain(torch.bfloat16, 128, page_size=256, heads=group, kv_heads=1)
    plain.MANY = many
    limit = SHARED_MEMORY[architecture(torch.device("cpu"))]
    for kernel in module._persistent_decode_kernel.device_caches[0][0].values():
        assert kernel.metadata.shared <= limit, f"{kernel.metadata.shared} bytes of shared memory; {limit} are there"
