"""RMS normalisation, optionally fused with the residual addition before it.

    residual = residual + x                              (when a residual is given; written in place)
    y = weight * residual / sqrt(mean(residual^2) + eps)

Legend: T tokens, D hidden size. x, residual, y  # [T, D]; weight  # [D].
Bound by memory: 2 reads and 2 writes of [T, D] with the residual, 1 and 1 without.
One program normalises one row, so a row's result does not depend on its neighbours. Sums are fp32; the sum and the
normalised value are rounded to x's dtype before they are used on, as transformers does.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import check_same, next_power_of_2, use_triton


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in torch; x, residual  # [T, D]; weight  # [D]. Updates `residual` in place."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


# Strides are fixed by the model, so they are specialised: as multiples of 16 they keep the loads 16 bytes wide.
@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    wait_for_previous_kernel(PDL)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_stride + cols
        x = (x.to(tl.float32) + tl.load(residual_row, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_row, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    y = weight.to(tl.float32) * (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise x  # [T, D] with weight  # [D]; with a residual  # [T, D], add x to it in place first.

    Returns y  # [T, D] in x's dtype. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, D], got {list(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError("x: last dimension must be contiguous")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight: expected [{x.shape[1]}], got {list(weight.shape)}")
    check_same("weight", weight, device=x.device, dtype=x.dtype)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected {list(x.shape)}, got {list(residual.shape)}")
        if residual.stride(1) != 1:
            raise ValueError("residual: last dimension must be contiguous")
        check_same("residual", residual, device=x.device, dtype=x.dtype)
    if not use_triton(x):
        return rms_norm_reference(x, weight, eps, residual)

    tokens, hidden = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if tokens == 0:
        return y
    block = next_power_of_2(hidden)
    _rms_norm_kernel[(tokens,)](
        x,
        weight,
        residual,
        y,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        y.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread: one or two 16-byte loads
        **dependent_launch(x.device),
    )
    return y
