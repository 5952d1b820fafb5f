from typing import Any

import torch

from minisgl.kernels import attention_decode as module
from minisgl.kernels.attention_decode import attention_decode, attention_decode_rotary
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY
from minisgl.kernels.rotary import Rotary
from tests.kernels.arithmetic import arithmetic


def launch() -> None:
    for case in (Case(torch.bfloat16, 128), Case(torch.float32, 64)):
        few, many = case.compile_few(), case.compile_many()
        assert arithmetic(few) == arithmetic(many), f"sums differ: {case.out.dtype}, {list(case.out.shape)}"
    # Each other tile, page size, group and mode once: not each with each.
    Case(torch.bfloat16, 64, page_size=16, window=4096).compile_many()
    Case(torch.bfloat16, 80).compile_rotary(500)  # splits that the last program combines
    Case(torch.float16, 256, page_size=256, heads=7, kv_heads=1).compile_few()
    Case(torch.bfloat16, 128, page_size=256, heads=128, kv_heads=1).compile_many()
    Case(torch.float32, 128).compile_rotary(9000)
    Case(torch.float32, 256).compile_few()
    limit = SHARED_MEMORY[architecture(torch.device("cpu"))]
    for kernel in compiled():
        assert kernel.metadata.shared <= limit, f"{kernel.metadata.shared} bytes of shared memory; {limit} are there"


def compiled() -> list[Any]:
    return list(module._attention_decode_kernel.device_caches[0][0].values())


class Case:
    def __init__(
        self,
        dtype: torch.dtype,
        head_dim: int,
        page_size: int = 64,
        window: int = 0,
        heads: int = 32,
        kv_heads: int = 8,
    ) -> None:
        self.qkv = torch.empty(2, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        self.out = torch.empty(2, heads, head_dim, dtype=dtype)
        cache = torch.empty(1, page_size, kv_heads, head_dim, dtype=dtype)
        index = torch.zeros(2, dtype=torch.int32)
        self.pages = cache, cache, index[None], index, index, 9000
        self.options = {"scale": 1.0, "window": window, "out": self.out}

    def compile_rotary(self, max_kv_len: int) -> None:
        head_dim = self.out.shape[2]
        norm = torch.empty(head_dim, dtype=self.out.dtype)
        rotary = Rotary(torch.empty(9000, head_dim), norm, norm, 1e-6)
        arrivals = torch.zeros(module.num_arrivals(self.pages[0].shape[2]), dtype=torch.int32)
        attention_decode_rotary(self.qkv, *self.pages[:-1], max_kv_len, rotary, arrivals, **self.options)

    def compile_few(self) -> Any:
        q = self.qkv.unflatten(1, (-1, self.out.shape[2]))[:, : self.out.shape[1]]
        attention_decode(q, *self.pages, **self.options)
        return compiled()[-1]

    def compile_many(self) -> Any:
        many, module.MANY = module.MANY, 1
        kernel = self.compile_few()
        module.MANY = many
        return kernel
