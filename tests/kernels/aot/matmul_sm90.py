import torch

from minisgl.kernels.paged import SHARED_MEMORY

ARCHITECTURES = ["sm_90"]


def launch() -> None:
    from minisgl.kernels import matmul_sm90 as module

    for kind, rules in module.RULES.items():
        for rule in rules:
            _launch(module, kind, rule, torch.bfloat16)
        _launch(module, kind, rules[0], torch.float16, bias=True)
        _launch(module, kind, rules[0], torch.bfloat16, rows=33, inputs=1000)  # sizes not of 16
    for kernel in module._matmul_sm90.device_caches[0][0].values():
        shared = kernel.metadata.shared
        assert shared <= SHARED_MEMORY["sm_90"], f"{shared} of {SHARED_MEMORY['sm_90']} bytes of shared memory"


def _launch(module, kind, rule, dtype, rows=None, inputs=4096, bias=False) -> None:
    outputs = min(rule.max_outputs, 20480) * (1 + (kind == module.GATED))
    x, weight = torch.empty(rows or rule.max_rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    module.matmul_sm90(x, weight, weight.new_empty(outputs) if bias else None, rule.tile, kind)
