import torch

from minisgl.kernels.paged import SHARED_MEMORY

ARCHITECTURES = ["sm_90"]


def launch() -> None:
    from minisgl.kernels import matmul_sm90 as module

    for (kind, rows, outputs), tile in module.TILES["sm_90"].items():
        _launch(module, kind, rows, min(outputs, 20480), tile, torch.bfloat16)
    for kind in (module.WHOLE, module.GATED, module.PARTS):
        _launch(module, kind, 64, 4224, tile, torch.float16, bias=True)
        _launch(module, kind, 64, 1000, tile, torch.bfloat16, inputs=1000)  # sizes not of 16
    for kernel in module._matmul_sm90.device_caches[0][0].values():
        shared = kernel.metadata.shared
        assert shared <= SHARED_MEMORY["sm_90"], f"{shared} of {SHARED_MEMORY['sm_90']} bytes of shared memory"


def _launch(module, kind, rows, outputs, tile, dtype, inputs=4096, bias=False) -> None:
    outputs *= 1 + (kind == module.GATED)
    x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    module.matmul_sm90(x, weight, weight.new_empty(outputs) if bias else None, tile, kind)
