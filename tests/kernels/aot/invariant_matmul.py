import torch

from minisgl.kernels import invariant_matmul as module
from minisgl.kernels.invariant_matmul import ANY, FP32_TILES, SAFE_TILES, TILES, invariant_matmul
from minisgl.kernels.launch import architecture
from minisgl.kernels.paged import SHARED_MEMORY


def launch() -> None:
    arch = architecture(torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiles = FP32_TILES if dtype == torch.float32 else TILES.get(arch, SAFE_TILES)
        for bucket in tiles if dtype == torch.bfloat16 else [(ANY, ANY)]:
            rows, outputs = min(bucket[0], 5000), min(bucket[1], 151936)
            _launch(rows, min(outputs, 1024), 3072, dtype)  # in splits
            _launch(rows, outputs, 4096, dtype)
            if bucket in (min(tiles), (ANY, ANY)):
                _launch(rows, outputs, 1001, dtype, bias=True)  # no descriptors, no loads of 16 bytes
    for kernel in module._invariant_matmul_kernel.device_caches[0][0].values():
        shared = kernel.metadata.shared
        assert shared <= SHARED_MEMORY[arch], f"{shared} of {SHARED_MEMORY[arch]} bytes of shared memory"


def _launch(rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool = False) -> None:
    x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    invariant_matmul(x, weight, torch.empty(outputs, dtype=dtype) if bias else None)
