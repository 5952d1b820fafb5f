import torch

from minisgl.kernels import skinny_matmul as module
from minisgl.kernels.skinny_matmul import (
    FP32_RULES,
    RULES,
    SAFE_RULES,
    Rule,
    Stream,
    matmul_into,
    normed_matmul,
    skinny_matmul,
)


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rules = FP32_RULES if dtype == torch.float32 else RULES.get(module.architecture("cpu"), SAFE_RULES)
        algorithms = set()
        for rule in rules[:1] if dtype == torch.float16 else rules:
            is_new = rule.max_m not in algorithms
            _launch(rule, 20480, dtype, variants=is_new and dtype == torch.bfloat16)
            if is_new:
                _launch(rule, 1000, dtype)  # without loads of 16 bytes
            algorithms.add(rule.max_m)


def _launch(rule: Rule, inputs: int, dtype: torch.dtype, variants: bool = True) -> None:
    """Compile a rule's tile; `variants`: with each thing that a launch may do beside the matmul."""
    rows, outputs, inputs = rule.max_m, min(rule.max_n, 40_000), min(rule.max_k, inputs)
    x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    skinny_matmul(x, weight)
    if not variants:
        return
    skinny_matmul(x, weight, torch.empty(outputs, dtype=dtype))
    squares = torch.empty(rows, 512)
    normed_matmul(Stream(x, x, squares, 1e-6), weight)
    normed_matmul(Stream(x, x, squares, 1e-6), weight, gated=True)
    residual = torch.empty(rows, outputs, dtype=dtype)
    matmul_into(Stream(residual, residual, squares, 1e-6), x, weight, None, weight.new_empty(outputs))
