"""The gate of a SwiGLU feed-forward: y = silu(gate) * up, gate and up side by side in one projection's output.

    silu(g) = g / (1 + exp(-g))

Legend: T tokens, I intermediate size. x  # [T, 2I]: gate, then up; y  # [T, I].
Bound by memory: reads [T, 2I], writes [T, I]. One program makes up to 1024 values of one row. Arithmetic is fp32;
silu is rounded to x's dtype before it multiplies, as transformers does.
Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, next_power_of_2, use_triton


def silu_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in torch; x  # [T, 2I]; returns [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    wide = gate.to(torch.promote_types(x.dtype, torch.float32))
    # Not torch's silu: its loops on a CPU end in other code than they run in, so that bits depend on a value's place.
    silu = wide / wide.neg().exp_().add_(1)
    return silu.to(x.dtype) * up


@triton.jit
def _silu_mul_kernel(x_ptr, y_ptr, x_stride, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    # One grid axis: neighbours work on neighbouring columns, and T is not limited to the 65,535 of the second axis.
    ROW_PROGRAMS: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // ROW_PROGRAMS).to(tl.int64)
    cols = tl.program_id(0) % ROW_PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE
    wait_for_previous_kernel(PDL)
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + INTERMEDIATE + cols, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(y_ptr + row * INTERMEDIATE + cols, (silu * up.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x  # [T, 2I], gate first; rows may be strided.

    Returns y  # [T, I] in x's dtype, contiguous. Raises ValueError for a wrong shape or stride.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x: expected [T, 2I], got {list(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError("x: last dimension must be contiguous")
    if not x.is_floating_point():
        raise ValueError(f"x: has dtype {x.dtype}, expected a floating point one")
    if not use_triton(x):
        return silu_mul_reference(x)

    tokens, intermediate = x.shape[0], x.shape[1] // 2
    y = torch.empty(tokens, intermediate, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block = min(next_power_of_2(intermediate), 1024)
    _silu_mul_kernel[(tokens * cdiv(intermediate, block),)](
        x,
        y,
        x.stride(0),  # fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide
        INTERMEDIATE=intermediate,
        BLOCK=block,
        num_warps=max(block // 256, 1),  # 8 elements a thread: one 16-byte load of bf16 from each half
        **dependent_launch(x.device),
    )
    return y
