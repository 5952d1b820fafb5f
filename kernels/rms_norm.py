"""RMS normalisation, optionally fused with the residual addition before it.

    residual = residual + x                              (when a residual is given; written in place)
    y = weight * residual / sqrt(mean(residual^2) + eps)

Legend: T tokens, D hidden size. x, residual, y  # [T, D]; weight  # [D]. x may come in S parts  # [S, T, D], as a
matmul leaves them that split its inputs (`matmul_sm90`): their sum, rounded, is x.
Bound by memory: 2 reads and 2 writes of [T, D] with the residual, 1 and 1 without.
One program normalises one row, so a row's result does not depend on its neighbours. Sums are fp32; the sum and the
normalised value are rounded to x's dtype before they are used on, as transformers does.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, start_next_kernel, wait_for_previous_kernel
from minisgl.kernels.launch import check_same, next_power_of_2, use_triton

# Of a batch with up to so many tokens or elements, the next kernel starts before the wait. On an H200, decode steps of
# Qwen3-0.6B and 8B gain 3% at 32 rows, 2% at 64, up to 1% at 128; 0.6B gains 1% at 192, and 8B loses 1%.
EARLY_TOKENS, EARLY_ELEMENTS = 128, 256 * 1024


def early_tokens(hidden: int) -> int:
    """The most tokens whose norm lets the next kernel start early; of more, the norm is another kernel."""
    return max(EARLY_TOKENS, EARLY_ELEMENTS // hidden)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in torch; x  # [T, D] or [S, T, D], residual  # [T, D], weight  # [D]. Updates `residual` in place."""
    if x.dim() == 3:
        x = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(weight.dtype)
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


# Strides are fixed by the model, so they are specialised: as multiples of 16 they keep the loads 16 bytes wide.
@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    num_tokens,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_next_kernel(EARLY)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    # The kernel before this one wrote x, but not the residual: see dependent_launch.py.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_stride + cols
        residual = tl.load(residual_row, mask=mask, other=0.0, cache_modifier=".cg")
    wait_for_previous_kernel(PDL)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if PARTS > 1:
        total = x.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += tl.load(x_ptr + (part * num_tokens + row) * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_row, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    y = weight.to(tl.float32) * (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise x  # [T, D] with weight  # [D]; with a residual  # [T, D], add x to it in place first. Instead of x its
    parts  # [S, T, D], contiguous, S > 1.

    The kernel just before may write x, but not the rest, which is read ahead; and the one just behind may read ahead
    no more than weights and what a step prepared (see dependent_launch.py).
    Returns y  # [T, D] in weight's dtype, which x has too. Raises ValueError for a wrong shape, stride, dtype or
    device.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected [T, D] or [S, T, D], got {list(x.shape)}")
    if x.stride(-1) != 1:
        raise ValueError("x: last dimension must be contiguous")
    parts = x.shape[0] if x.dim() == 3 else 1
    if x.dim() == 3 and (parts < 2 or not x.is_contiguous()):
        raise ValueError("x: parts must be two or more, and contiguous")
    tokens, hidden = x.shape[-2:]
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected [{hidden}], got {list(weight.shape)}")
    check_same("x", x, device=weight.device, dtype=weight.dtype)
    if residual is not None:
        if residual.shape != x.shape[-2:]:
            raise ValueError(f"residual: expected {[tokens, hidden]}, got {list(residual.shape)}")
        if residual.stride(1) != 1:
            raise ValueError("residual: last dimension must be contiguous")
        check_same("residual", residual, device=weight.device, dtype=weight.dtype)
    if not use_triton(x):
        return rms_norm_reference(x, weight, eps, residual)

    y = torch.empty(tokens, hidden, dtype=weight.dtype, device=x.device)
    if tokens == 0:
        return y
    block = next_power_of_2(hidden)
    launch = dependent_launch(x.device)
    _rms_norm_kernel[(tokens,)](
        x,
        weight,
        residual,
        y,
        tokens,
        x.stride(-2),
        residual.stride(0) if residual is not None else 0,
        y.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        PARTS=parts,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread: one or two 16-byte loads
        EARLY=launch["PDL"] and tokens <= early_tokens(hidden),
        **launch,
    )
    return y
