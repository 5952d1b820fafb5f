"""Token embedding: y[t] = weight[ids[t] - first_id], zeros for an id that has no row.

Ids are checked where requests enter; here a bad id must only not read out of bounds. Zeros are also what a rank that
does not hold an id's row contributes to the sum over ranks.

Legend: T tokens, V vocabulary (rows of this rank's table), D hidden size. ids  # [T]; weight  # [V, D]; y  # [T, D].
Bound by memory: reads and writes [T, D]. One program copies up to 1024 values of one row.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, check, check_same, next_power_of_2, use_triton
from minisgl.kernels.skinny_matmul import Stream, stream_reference


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor, first_id: int = 0) -> torch.Tensor:
    """The same in torch; ids  # [T]; weight  # [V, D]; returns [T, D]."""
    vocab, rows = weight.shape[0], ids.long() - first_id
    return weight[rows.clamp(0, vocab - 1)].masked_fill_(((rows < 0) | (rows >= vocab)).unsqueeze(1), 0)


@triton.jit(do_not_specialize=["ids_ptr"])  # ids may be a slice of any alignment
def _embedding_kernel(
    ids_ptr,
    weight_ptr,
    y_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
    weight_stride,
    FIRST_ID: tl.constexpr,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    ROW_PROGRAMS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // ROW_PROGRAMS).to(tl.int64)
    cols = tl.program_id(0) % ROW_PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    wait_for_previous_kernel(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64) - FIRST_ID
    readable = tl.where((row >= 0) & (row < VOCAB), HIDDEN, 0)
    y = tl.load(weight_ptr + row * weight_stride + cols, mask=cols < readable, other=0.0)
    tl.store(y_ptr + token * HIDDEN + cols, y, mask=mask)
    if TO_STREAM:
        wide = y.to(tl.float32)
        scaled = wide * tl.load(norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + token * HIDDEN + cols, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)
        tl.store(squares_ptr + tl.program_id(0), tl.sum(wide * wide, 0))  # [T, ROW_PROGRAMS]


def embedding(ids: torch.Tensor, weight: torch.Tensor, first_id: int = 0) -> torch.Tensor:
    """Rows of weight  # [V, D], which are of ids from `first_id` on, named by ids  # [T] int32; zeros where there is no
    such row.

    Returns y  # [T, D] in weight's dtype. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    _check(ids, weight)
    if not use_triton(weight):
        return embedding_reference(ids, weight, first_id)
    y = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
    _launch(ids, weight, y, first_id)
    return y


def embedding_stream(ids: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> Stream:
    """`embedding` as the residual stream before the norm with norm_weight  # [D]; arguments and errors as there, and
    every id has a row."""
    _check(ids, weight)
    check(norm_weight.shape == weight.shape[1:], f"norm_weight: expected [{weight.shape[1]}]")
    check_same("norm_weight", norm_weight, device=weight.device, dtype=weight.dtype)
    if not use_triton(weight):
        return stream_reference(embedding_reference(ids, weight), norm_weight, eps)
    y = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
    parts = cdiv(y.shape[1], _block(y.shape[1]))
    stream = Stream(y, torch.empty_like(y), torch.empty(len(y), parts, dtype=torch.float32, device=y.device), eps)
    _launch(ids, weight, y, 0, norm_weight, stream.scaled, stream.squares)
    return stream


def _check(ids: torch.Tensor, weight: torch.Tensor) -> None:
    check(ids.dim() == 1, f"ids: expected [T], got {list(ids.shape)}")
    check(ids.is_contiguous(), "ids: must be contiguous")
    check(weight.dim() == 2 and weight.shape[0] > 0, f"weight: expected [V, D], got {list(weight.shape)}")
    check(weight.stride(-1) == 1, "weight: last dimension must be contiguous")
    check_same("ids", ids, device=weight.device, dtype=torch.int32)


def _block(hidden: int) -> int:
    return min(next_power_of_2(hidden), 1024)


def _launch(
    ids: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    first_id: int,
    norm_weight: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> None:
    if y.numel() == 0:
        return
    vocab, hidden = weight.shape
    block = _block(hidden)
    _embedding_kernel[(len(ids) * cdiv(hidden, block),)](
        ids,
        weight,
        y,
        norm_weight,
        scaled,
        squares,
        weight.stride(0),  # fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide
        FIRST_ID=first_id,
        VOCAB=vocab,
        HIDDEN=hidden,
        BLOCK=block,
        TO_STREAM=norm_weight is not None,
        num_warps=max(block // 256, 1),  # 8 elements a thread: one 16-byte load of bf16
        **dependent_launch(y.device),
    )
