"""q, k and v of a large decode batch on Hopper (sm_90), in Gluon: their matmul, and in the same launch what
`rotary_store` does to them. Also what `prefill_matmul_sm90`, for more rows, shares of it.

Legend: M rows (tokens), K inputs, H query heads, G KV heads, D head dim. x  # [M, K]; weight  # [(H + 2G) * D, K].
Bound by memory, 2 (H + 2G) D K bytes of weights in bf16.

A tile is 64 rows of x and 128 outputs, which are one head or two: a thread has both halves of its heads' values. One
program takes one; its one group of consumers loads the rows' angles while the ring fills. Beside `matmul_sm90` and
`rotary_store`, a layer without attention takes on an H200 9% less for Qwen3-0.6B at 64 rows, 5% at 192, 2% at 256, and
as long for 8B and 14B at 128; whole steps take up to 2% less for 0.6B, and up to 1% for 8B. Such tiles are large, and
where that leaves too much of the GPU without one it is slower: 0.6B by 1% at 128 rows, steps of 8B by 0.5% at 64, and
its layers without attention by 1 to 4% at 192 and 256.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minisgl.kernels.hopper import barrier, reinterpret
from minisgl.kernels.hopper_matmul import (
    BLOCK_K,
    LAYOUT,
    PRODUCER_REGISTERS,
    SMALL_BOX,
    Place,
    box_rows,
    check_matmul,
    is_loadable,
    mean_registers,
    multiply,
    new_ring,
    produce,
    weight_descriptor,
)
from minisgl.kernels.launch import cdiv, num_multiprocessors
from minisgl.kernels.matmul_sm90 import FEW_ROWS, MAX_ROWS, MIN_ROWS
from minisgl.kernels.rotary import Rotary, check_heads, check_tokens

ROWS = gl.constexpr(64)  # of x for a group of consumers, the rows of one wgmma
PART = gl.constexpr(128)  # outputs that a group finishes at a time
HEAD_DIMS = 64, 128
STAGES = 8
CONSUMER_REGISTERS = 176  # of a thread
# Tiles have to fill so much of the GPU; with FEW_ROWS rows not where the weight has no more elements than this.
MIN_FILL, SMALL_WEIGHT = 0.7, 1 << 24
Y_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART.value, 16]))
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 16 bytes a thread


class Heads(NamedTuple):
    """What is done to q, k and v; shapes are those of `rotary_store`."""

    q_ptr: gl.tensor
    positions_ptr: gl.tensor
    slots_ptr: gl.tensor
    k_cache_ptr: gl.tensor
    v_cache_ptr: gl.tensor
    cos_sin_ptr: gl.tensor
    q_norm_ptr: gl.tensor
    k_norm_ptr: gl.tensor
    eps: gl.tensor


class Tokens(NamedTuple):
    """What is read of a group's tokens before their sums are there."""

    rows: gl.tensor  # of x
    slots: gl.tensor
    cos: gl.tensor
    sin: gl.tensor


@gluon.jit
def _halves(y, HEAD_DIM: gl.constexpr):
    """The first and second halves  # [ROWS, heads, HEAD_DIM / 2] of heads side by side  # [ROWS, PART]."""
    return y.reshape([ROWS, PART // HEAD_DIM, 2, HEAD_DIM // 2]).permute((0, 1, 3, 2)).split()


@gluon.jit
def load_tokens(heads, first_row, is_rotated, M, BOX: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Places of a group's tokens, from row first_row of x on, and cosines and sines  # [ROWS, 1, HEAD_DIM / 2] as
    `_halves` has its rows."""
    halves = _halves(gl.full([ROWS, PART], 0.0, gl.float32, Y_LAYOUT), HEAD_DIM)
    layout: gl.constexpr = gl.SliceLayout(1, halves[0].type.layout)
    rows = box_rows(first_row, M, ROWS, BOX, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM // 2, layout=gl.SliceLayout(0, layout))
    places = gl.load(heads.positions_ptr + rows).to(gl.int64) * HEAD_DIM
    table = heads.cos_sin_ptr + places[:, None] + dims[None, :]
    mask = (rows >= 0)[:, None] & is_rotated
    cos = gl.expand_dims(gl.load(table, mask=mask, other=0.0), 1)
    sin = gl.expand_dims(gl.load(table + HEAD_DIM // 2, mask=mask, other=0.0), 1)
    rows_of_lines = box_rows(first_row, M, ROWS, BOX, gl.SliceLayout(1, LINES))
    return Tokens(rows_of_lines, gl.load(heads.slots_ptr + rows_of_lines), cos, sin)


@gluon.jit
def _normed(half, scale, weight_ptr):
    """One half of each head, whose rows' scales are given, rounded before its weight multiplies it, as in rms_norm."""
    dims = gl.arange(0, half.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, half.type.layout)))
    weight = gl.expand_dims(gl.load(weight_ptr + dims).to(gl.float32)[None, :], 1)
    return weight * (half.to(gl.float32) * scale).to(half.dtype).to(gl.float32)


@gluon.jit
def _rotate(y, heads, is_key, cos, sin, HEAD_DIM: gl.constexpr, HAS_NORM: gl.constexpr):
    """Norm and rotate heads side by side  # [ROWS, PART], as `rotary.rotate_heads` does."""
    first, second = _halves(y, HEAD_DIM)
    wide_first = first.to(gl.float32)
    wide_second = second.to(gl.float32)
    if HAS_NORM:
        norm_ptr = heads.q_norm_ptr
        if is_key:
            norm_ptr = heads.k_norm_ptr
        squares = gl.sum(wide_first * wide_first, 2) + gl.sum(wide_second * wide_second, 2)
        scale = gl.expand_dims(gl.rsqrt(squares / HEAD_DIM + heads.eps), 2)
        wide_first = _normed(first, scale, norm_ptr)
        wide_second = _normed(second, scale, norm_ptr + HEAD_DIM // 2)
    rotated = gl.join(wide_first * cos - wide_second * sin, wide_second * cos + wide_first * sin)
    return gl.convert_layout(rotated.to(y.dtype).permute((0, 1, 3, 2)).reshape([ROWS, PART]), y.type.layout)


@gluon.jit
def finish_heads(
    y,
    heads,
    tokens,
    buffer,
    start,
    Q_WIDTH: gl.constexpr,
    KV_WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_NORM: gl.constexpr,
):
    """Norm, rotate and store outputs  # [ROWS, PART] from `start` on, by way of a buffer of their size; outputs are
    Q_WIDTH of q, then KV_WIDTH each of k and v."""
    dims = gl.arange(0, PART, layout=gl.SliceLayout(0, LINES))
    if start < Q_WIDTH + KV_WIDTH:
        y = _rotate(y, heads, start >= Q_WIDTH, tokens.cos, tokens.sin, HEAD_DIM, HAS_NORM)
    barrier()  # the group's other warps have read the buffer
    buffer.store(y)
    barrier()
    lines = buffer.load(LINES)
    places = tokens.slots.to(gl.int64)[:, None] * KV_WIDTH
    is_stored = (tokens.slots >= 0)[:, None]
    if start < Q_WIDTH:
        gl.store(heads.q_ptr + tokens.rows.to(gl.int64)[:, None] * Q_WIDTH + (start + dims)[None, :], lines)
    elif start < Q_WIDTH + KV_WIDTH:
        gl.store(heads.k_cache_ptr + places + (start - Q_WIDTH + dims)[None, :], lines, mask=is_stored)
    else:
        gl.store(heads.v_cache_ptr + places + (start - Q_WIDTH - KV_WIDTH + dims)[None, :], lines, mask=is_stored)


@gluon.jit
def _consume(
    heads,
    bias_ptr,
    ring,
    place,
    M,
    BOX: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    KV_WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
):
    """The consumers: one group of four warps."""
    dtype: gl.constexpr = ring.x.dtype
    tokens = load_tokens(heads, place.token, place.output < Q_WIDTH + KV_WIDTH, M, BOX, HEAD_DIM)
    acc, _ = multiply(0, ring, 0, place.num_blocks, False)
    if HAS_BIAS:
        columns = place.output + gl.arange(0, PART, layout=gl.SliceLayout(0, Y_LAYOUT))
        acc += gl.load(bias_ptr + columns).to(gl.float32)[None, :]
    buffer = reinterpret(ring.x, dtype, [ring.x.shape[0] // 2, ROWS, PART], LAYOUT).index(0)
    finish_heads(acc.to(dtype), heads, tokens, buffer, place.output, Q_WIDTH, KV_WIDTH, HEAD_DIM, HAS_NORM)


# The index tensors are slices of one upload: their alignment changes from step to step and must not recompile.
@gluon.jit(do_not_specialize=["M", "positions_ptr", "slots_ptr"])
def _heads_matmul(
    x_desc,
    weight_desc,
    bias_ptr,
    q_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    M,
    num_blocks,
    Q_WIDTH: gl.constexpr,
    KV_WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    place = Place(gl.program_id(0) * ROWS, gl.program_id(1) * PART, 0, 0, num_blocks)
    ring = new_ring(x_desc.dtype, STAGES, 1, ROWS, PART, 0)
    heads = Heads(q_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, eps)
    gl.warp_specialize(
        [
            (_consume, (heads, bias_ptr, ring, place, M, BOX, Q_WIDTH, KV_WIDTH, HEAD_DIM, HAS_BIAS, HAS_NORM)),
            (produce, (x_desc, weight_desc, weight_desc, ring, place, M, 1, BOX, False, False)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def has_fitting_heads(weight: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether parts of PART outputs are whole heads, and all of q, of k or of v."""
    kv_heads, head_dim = k_cache.shape[2:]
    return head_dim in HEAD_DIMS and kv_heads * head_dim % PART.value == weight.shape[0] % PART.value == 0


def fits_heads(x: torch.Tensor, weight: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether `heads_matmul` takes these, valid for torch's, and is no slower than a matmul and `rotary_store`."""
    rows = x.shape[0]
    if not (MIN_ROWS <= rows <= MAX_ROWS and is_loadable(x, weight) and has_fitting_heads(weight, k_cache)):
        return False
    programs, processors = cdiv(rows, ROWS.value) * (weight.shape[0] // PART.value), num_multiprocessors(x.device)
    is_small = rows <= FEW_ROWS and weight.numel() <= SMALL_WEIGHT
    return programs <= processors and (is_small or programs >= MIN_FILL * processors)


def shared_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
    min_rows: int,
) -> dict[str, Any]:
    """Those of both kernels of q, k and v, with a new q, once they are checked; as in `heads_matmul`."""
    check_matmul(x, weight, bias, min_rows)
    num_heads = check_heads("weight", weight.shape[0], x, k_cache, v_cache, rotary)
    (rows, inputs), (kv_heads, head_dim) = x.shape, k_cache.shape[2:]
    check_tokens(rows, x.device, positions, slots)
    if (rotary.q_norm is None) != (rotary.k_norm is None):
        raise ValueError("k_norm: expected with q_norm, or neither")
    return {
        "bias_ptr": bias,
        "q_ptr": torch.empty(rows, num_heads, head_dim, dtype=x.dtype, device=x.device),
        "positions_ptr": positions,
        "slots_ptr": slots,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "cos_sin_ptr": rotary.cos_sin,
        "q_norm_ptr": rotary.q_norm,
        "k_norm_ptr": rotary.k_norm,
        "eps": rotary.eps,
        "M": rows,
        "num_blocks": cdiv(inputs, BLOCK_K.value),
        "Q_WIDTH": num_heads * head_dim,
        "KV_WIDTH": kv_heads * head_dim,
        "HEAD_DIM": head_dim,
        "HAS_BIAS": bias is not None,
        "HAS_NORM": rotary.q_norm is not None,
    }


def heads_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """`rotary_store` of y = x  # [M, K] times weight  # [(H + 2G) * D, K] plus bias  # [(H + 2G) * D].

    positions, slots  # [M] int32 and k_cache, v_cache  # [P, page_size, G, D] are those of `rotary_store`. The kernel
    just before may write x, but nothing else of these, which are read ahead (see dependent_launch.py). Returns q
    # [M, H, D] in x's dtype, contiguous. For what `fits_heads` takes; any M from 32 on is right. Raises ValueError for
    a wrong shape, dtype or device.
    """
    arguments = shared_arguments(x, weight, bias, positions, slots, k_cache, v_cache, rotary, SMALL_BOX)
    (rows, inputs), part = x.shape, PART.value
    _heads_matmul[cdiv(rows, ROWS.value), weight.shape[0] // part](
        TensorDescriptor(x, [rows, inputs], [x.stride(0), 1], [SMALL_BOX, BLOCK_K.value], LAYOUT.value),
        weight_descriptor(weight, part, gated=False),
        **arguments,
        BOX=SMALL_BOX,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=mean_registers(1, CONSUMER_REGISTERS),
        launch_pdl=True,
    )
    q: torch.Tensor = arguments["q_ptr"]
    return q
