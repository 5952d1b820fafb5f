"""What Hopper's matmuls of bf16 and fp16 share, in Gluon: a ring of blocks in shared memory that a producer fills and
consumer groups empty, and what a tile's rows, weights and registers are.

A block is 64 inputs of the tile's rows of x and of its weights, copied by TMA. A consumer group, four warps, multiplies
its rows of x with all of the tile's weights (wgmma). Weights of a gate and of up are copied 8 rows of each in turn, so
that the thread that has the one has the other. A tile may have a tail of weights beside a power of two.
Knows nothing of tiles' sizes, nor of what is done to sums, but for a gate.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.kernels.hopper import Address, async_load, barrier, reinterpret
from minisgl.kernels.launch import cdiv, check, check_same

BLOCK_K = gl.constexpr(64)  # 128 bytes, the widest that shared memory is swizzled by
PAIR = gl.constexpr(8)  # rows of the gate, then as many of up: what one thread holds are a row of each
SMALL_BOX = 32  # rows of x in a copy for one group: so few there are always
LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
PAIRS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
PRODUCER_REGISTERS = 40  # of a thread


class Ring(NamedTuple):
    """Buffers that the producer fills in turn and the consumers empty; a barrier of each kind for each buffer."""

    x: gl.shared_memory_descriptor
    weight: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Place(NamedTuple):
    """Where a program's tile is."""

    token: gl.tensor
    output: gl.tensor
    part: gl.tensor
    first_block: gl.tensor
    num_blocks: gl.tensor


@gluon.jit
def new_ring(
    dtype: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr,
):
    """A ring of STAGES blocks, of ROWS rows of x for each of GROUPS consumer groups and BLOCK_N + TAIL_N of weights."""
    x = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, BLOCK_K], LAYOUT)
    weight = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], LAYOUT)
    tail = weight
    if TAIL_N > 0:
        tail = gl.allocate_shared_memory(dtype, [STAGES, TAIL_N, BLOCK_K], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), GROUPS)
    fence_async_shared()
    barrier()
    return Ring(x, weight, tail, full, empty)


@gluon.jit
def load_weights(desc, ring_part, stage, full, output, start, IS_GATED: gl.constexpr):
    """Copy a block of the tile's weights; desc  # [N, K], or [N / 8, 2, 8, K] when gated."""
    target = ring_part.index(stage)
    if IS_GATED:
        ROWS: gl.constexpr = ring_part.shape[1]
        pairs: gl.constexpr = [ROWS // (2 * PAIR), 2, PAIR, BLOCK_K]
        async_load(desc, [output // PAIR, 0, 0, start], full, reinterpret(target, desc.dtype, pairs, PAIRS_LAYOUT))
    else:
        async_load(desc, [output, start], full, target)


@gluon.jit
def _load_block(weight_desc, tail_desc, ring, stage, place, block, IS_GATED: gl.constexpr, TAIL: gl.constexpr):
    """Copy block `block` of the tile's weights to a free buffer; rows of x follow."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    full = ring.full.index(stage)
    start = (place.first_block + block) * BLOCK_K
    load_weights(weight_desc, ring.weight, stage, full, place.output, start, IS_GATED)
    if TAIL:
        output = place.output + (BLOCK_N // 2 if IS_GATED else BLOCK_N)
        load_weights(tail_desc, ring.tail, stage, full, output, start, IS_GATED)


@gluon.jit
def _first_row(row, M, BOX: gl.constexpr):
    """Where the box of `row` rows into x starts. The last box has rows of the one before once more, for the same
    result: rows past the end are slow to load."""
    return gl.minimum(row, M - BOX)


@gluon.jit
def box_rows(first_row, M, ROWS: gl.constexpr, BOX: gl.constexpr, layout: gl.constexpr):
    """The rows of x  # [ROWS] that a tile has from first_row on, which were copied in boxes."""
    rows = gl.arange(0, ROWS, layout=layout)
    return _first_row(first_row + rows // BOX * BOX, M, BOX) + rows % BOX


@gluon.jit
def _load_rows(x_desc, ring, stage, place, block, M, GROUPS: gl.constexpr, BOX: gl.constexpr):
    """Copy block `block` of the tile's rows of x."""
    ROWS: gl.constexpr = ring.x.shape[1]
    for group in gl.static_range(GROUPS):
        rows = ring.x.index(stage * GROUPS + group)
        for row in gl.static_range(0, ROWS, BOX):
            first = _first_row(place.token + group * ROWS + row, M, BOX)
            start = (place.first_block + block) * BLOCK_K
            async_load(x_desc, [first, start], ring.full.index(stage), rows.slice(row, BOX))


@gluon.jit
def produce(
    x_desc,
    weight_desc,
    tail_desc,
    ring,
    place,
    M,
    GROUPS: gl.constexpr,
    BOX: gl.constexpr,
    IS_GATED: gl.constexpr,
    TAIL: gl.constexpr,
):
    """The producer: one warp that copies all that the consumers read."""
    STAGES: gl.constexpr = ring.full.shape[0]
    tile_rows: gl.constexpr = ring.x.shape[1] * GROUPS + ring.weight.shape[1] + (ring.tail.shape[1] if TAIL else 0)
    BYTES: gl.constexpr = tile_rows * BLOCK_K * 2
    ahead = gl.minimum(place.num_blocks, STAGES)
    for block in range(ahead):
        mbarrier.expect(ring.full.index(block), BYTES)
        _load_block(weight_desc, tail_desc, ring, block, place, block, IS_GATED, TAIL)
    # Consumers write nothing before they have read x, which is asked for after this.
    gdc_wait()
    gdc_launch_dependents()
    for block in range(ahead):
        _load_rows(x_desc, ring, block, place, block, M, GROUPS, BOX)
    for block in range(STAGES, place.num_blocks):
        stage = block % STAGES
        mbarrier.wait(ring.empty.index(stage), (block // STAGES - 1) & 1)
        mbarrier.expect(ring.full.index(stage), BYTES)
        _load_block(weight_desc, tail_desc, ring, stage, place, block, IS_GATED, TAIL)
        _load_rows(x_desc, ring, stage, place, block, M, GROUPS, BOX)


@gluon.jit
def multiply(GROUP: gl.constexpr, ring, turn, num_blocks, TAIL: gl.constexpr):
    """Sums of a group's rows of x with the tile's weights  # [rows, BLOCK_N], and with the tail's; of blocks that are
    in the ring from `turn` on. The last one's buffer is the caller's to give back."""
    STAGES: gl.constexpr = ring.full.shape[0]
    GROUPS: gl.constexpr = ring.x.shape[0] // STAGES
    ROWS: gl.constexpr = ring.x.shape[1]
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    TAIL_N: gl.constexpr = ring.tail.shape[1]
    acc = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    if TAIL:
        tail = gl.full([ROWS, TAIL_N], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL_N, 16]))
    for block in range(num_blocks):
        stage = (turn + block) % STAGES
        mbarrier.wait(ring.full.index(stage), ((turn + block) // STAGES) & 1)
        x = ring.x.index(stage * GROUPS + GROUP)
        acc = warpgroup_mma(x, ring.weight.index(stage).permute((1, 0)), acc, is_async=True)
        # This block's are in flight; those of the block before have ended, and its buffer is free.
        if TAIL:
            tail = warpgroup_mma(x, ring.tail.index(stage).permute((1, 0)), tail, is_async=True)
            acc, tail = warpgroup_mma_wait(2, [acc, tail])
        else:
            acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(ring.empty.index((turn + block + STAGES - 1) % STAGES), pred=block > 0)
    if TAIL:
        acc, tail = warpgroup_mma_wait(0, [acc, tail])
    else:
        acc = warpgroup_mma_wait(0, [acc])
        tail = acc
    return acc, tail


@gluon.jit
def split_pairs(sums):
    """Sums of pairs  # [rows, 2 outputs], as `load_weights` orders them -> of the gate and of up  # [rows, outputs]."""
    ROWS: gl.constexpr = sums.shape[0]
    OUTPUTS: gl.constexpr = sums.shape[1] // 2
    gate, up = sums.reshape([ROWS, OUTPUTS // PAIR, 2, PAIR]).permute((0, 1, 3, 2)).split()
    return gate.reshape([ROWS, OUTPUTS]), up.reshape([ROWS, OUTPUTS])


@gluon.jit
def gate_up(gate, up, dtype: gl.constexpr):
    """silu(gate) * up of fp32 sums, which are rounded where kernels apart would round them."""
    gate = gate.to(dtype).to(gl.float32)
    # gate / (1 + exp(-gate)) in five instructions; a gate below -87, whose silu is above -1e-36, may give 0.
    silu = gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;  // -log2(e)
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 t, t;
        mul.f32 $0, $1, t;
        }""",
        "=r,r",
        [gate],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return (silu.to(dtype).to(gl.float32) * up.to(dtype).to(gl.float32)).to(dtype)


def is_loadable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether TMA can copy blocks of both, which are valid for torch's matmul."""
    return (
        x.itemsize == 2
        and x.stride(1) == weight.stride(1) == 1
        and x.stride(0) % 8 == weight.stride(0) % 8 == 0
        and x.stride(0) > 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def check_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, min_rows: int) -> None:
    """Raises ValueError, naming the argument, for a wrong shape, dtype or device, or for fewer than min_rows rows;
    x  # [M, K], weight  # [N, K], bias  # [N]."""
    rows, inputs = x.shape
    check(rows >= min_rows, f"x: expected at least {min_rows} rows, got {rows}")
    check(weight.shape[1] == inputs, f"weight: expected [N, {inputs}], got {list(weight.shape)}")
    check_same("weight", weight, device=x.device, dtype=x.dtype)
    if bias is not None:
        check(bias.shape == weight.shape[:1], f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
        check_same("bias", bias, device=x.device, dtype=x.dtype)


@lru_cache(maxsize=4096)  # 5 us each, and each weight has the same in every step
def _weight_descriptor(
    pointer: int, dtype: torch.dtype, rows: int, inputs: int, stride: int, box: int, gated: bool
) -> TensorDescriptor:
    base = Address(pointer, dtype)
    if not gated:
        return TensorDescriptor(base, [rows, inputs], [stride, 1], [box, BLOCK_K.value], LAYOUT.value)
    pair = PAIR.value
    shape = [rows // 2 // pair, 2, pair, inputs]
    strides = [pair * stride, rows // 2 * stride, stride, 1]
    return TensorDescriptor(base, shape, strides, [box // (2 * pair), 2, pair, BLOCK_K.value], PAIRS_LAYOUT.value)


def weight_descriptor(weight: torch.Tensor, box: int, gated: bool) -> TensorDescriptor:
    """What `load_weights` copies `box` rows of the weight  # [N, K] by; in pairs if it is gated."""
    return _weight_descriptor(weight.data_ptr(), weight.dtype, *weight.shape, weight.stride(0), box, gated)


def mean_registers(groups: int, consumer: int) -> int:
    """Of all threads of a program whose consumers' have so many, rounded up to what the hardware gives."""
    return cdiv(groups * consumer + PRODUCER_REGISTERS, 8 * (groups + 1)) * 8
