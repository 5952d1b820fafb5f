"""Matmuls of a large decode batch on Hopper (sm_90), in Gluon: y = x W^T + b for 32 to 256 rows.

    WHOLE   y
    GATED   silu(first half of y) * second half
    PARTS   y in S parts that are still to be added, where K is split over programs

Legend: M rows (tokens), N outputs, K inputs, S parts. x  # [M, K]; weight  # [N, K], [2N, K] when gated; bias  # of its
rows. Bound by memory up to about 200 rows, 2 N K bytes in bf16; by 2 M N K flops above. Sums are fp32, y and its parts
are rounded to x's dtype.

A program has one tile: some rows of x, some of the weight, and a share of K. Its producer, one warp, copies blocks of
64 inputs to a ring in shared memory by TMA; one to three consumer groups of four warps multiply a group's rows of x
with the tile's weights (wgmma). What it is made for:
- Weights do not depend on the kernel before: the producer fills the ring with them before it waits for that kernel
  (see dependent_launch.py), so that loading begins while norms and attention still run.
- A tile of a wide weight takes all rows of x where it can, so that a weight goes from memory to a multiprocessor once.
  Its width is such that almost all multiprocessors have one program: 96 outputs of 192 rows of the weight too, which is
  one tile of 128 and one of 64. So most bounds of TILES are the 132 multiprocessors of an H200 times a width; the gate
  and up of Qwen3-14B at 129 to 192 rows are two turns of tiles of 72 outputs, level with torch's matmul and gate at 160
  rows and 10 to 19% faster at 192.
- A tile of a narrow weight takes 64 rows of x and more of the weight, which other programs read too: what a program
  reads of both is less so, and less of it has to wait for the kernel before. With 129 to 192 rows, a step of Qwen3-0.6B
  is 1.2% shorter, and 2.4% with norms that let it start early.
- Narrow weights have few tiles: K is split, and the norm that reads y (`rms_norm`) adds the parts, for no launch. They
  are rounded, as ranks' sums are under tensor parallelism, which makes y's error 1.5 times that of one rounding: in
  fp32 a layer of Qwen3-8B or 14B takes 1 to 2% longer, one of 0.6B up to 7%, for all of them are written at once and
  read at once.
- A gate and its up are in one tile, 8 rows of each in turn, as one descriptor with four dimensions reads them: so the
  thread that has the one has the other.
- Between the last block of one matmul and the first of the next, memory has nothing to do, and the end of a tile is on
  that way: y goes 16 bytes a thread, by way of a buffer of x, and the gate divides in one instruction.
In the middle of a tile these kernels are at the limits: of a gate and up of Qwen3-8B, 4.3 TB/s of weights at 64 rows,
4.1 at 128, 676 TFLOP/s at 192, 745 at 256 on an H200. Start and end are another 6, 8, 9 and 10 us.
Where torch is faster, there is no tile. Tried without gain on an H200:
- copies shared by clusters of two, which Gluon can say from Triton 3.9 on;
- weights asked for in L2 by pages of DRAM, ahead of the ring: two to three times as slow;
- norms as part of these matmuls, as in `skinny_matmul`: a tile's last program adds its parts and the residual, and the
  next matmul divides. A layer of Qwen3-8B without attention takes 131 us in place of 111 at 64 rows, and 139 in place
  of 124 at 128: what the last programs do is on the way of all, and a norm runs while the next ring fills;
- a norm at the head of the matmul that reads it: each program norms a row and waits for the others while its ring
  fills. A layer without attention takes 2 to 4% longer for Qwen3-8B, 7 to 13% for 0.6B; with the norm before gate and
  up alone 0 to 2% and 4 to 5%. With rows given to programs as they come, or with flags in place of the end of the
  kernel before, it takes 1 to 5% more than that;
- o, norm, gate, down, norm and qkv in one kernel that stays, with barriers over the grid and a ring that takes the next
  matmul's weights meanwhile: Qwen3-8B takes 130 us in place of 118 at 128 rows and 194 in place of 167 at 256, 0.6B 25
  for 23 at 128, 14B 220 for 191;
- q, k and v in parts, before anything has added them: 2% less to 1% more of a layer;
- the end of a matmul asks for the start of the next one's weights in L2: level or slower at every shape;
- a ring of rows with fewer blocks than that of weights, which gets more: rows are what is waited for, and a decode step
  of Qwen3-8B is 3 to 6% longer with four blocks of them, 11 to 15% with three;
- rings of half the size, so that two matmuls' programs fit on a multiprocessor: steps 1 to 8% longer;
- each program starts at another block of inputs, so that not all ask for the same rows at once: 1 to 5% longer.

A row's bits depend on how many rows there are, since that chooses the tile and S.
"""

from math import prod
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minisgl.kernels.hopper import barrier, reinterpret
from minisgl.kernels.hopper_matmul import (
    BLOCK_K,
    LAYOUT,
    PAIR,
    PRODUCER_REGISTERS,
    SMALL_BOX,
    Place,
    box_rows,
    check_matmul,
    gate_up,
    is_loadable,
    mean_registers,
    multiply,
    new_ring,
    produce,
    split_pairs,
    weight_descriptor,
)
from minisgl.kernels.launch import cdiv, num_multiprocessors
from minisgl.kernels.silu_mul import silu_mul_reference

WHOLE, GATED, PARTS = "whole", "gated", "parts"
ANY = 1 << 31  # no bound
MIN_ROWS, MAX_ROWS = 32, 256
MOST_PARTS = 4  # with more, reading them takes the norm longer than the matmul gains
MIN_PART_BLOCKS = 4  # a part has at least so many blocks of inputs
# Above FEW_ROWS rows, tiles of a weight of more elements than SMALL_WEIGHT, which take turns where there are more than
# multiprocessors, need to fill so much of them.
FEW_ROWS, SMALL_WEIGHT, MIN_FILL = 64, 1 << 23, 0.82


class Tile(NamedTuple):
    """A program's tile, and how it comes by it."""

    groups: int  # of consumers
    rows: int  # of x for each group
    block_n: int  # rows of the weight
    tail_n: int  # and so many more; may be 0
    stages: int  # blocks in the ring


# By architecture; then by kind, most rows and most outputs, of which the first that holds counts. Without one torch is
# faster.
TILES: dict[str, dict[tuple[str, int, int], Tile]] = {
    "sm_90": {
        (WHOLE, 64, 4224): Tile(1, 64, 32, 0, 8),
        (WHOLE, 64, 6336): Tile(1, 64, 32, 16, 12),
        (WHOLE, 64, 8448): Tile(1, 64, 64, 0, 8),
        (WHOLE, 128, 4224): Tile(1, 64, 64, 0, 8),
        (WHOLE, 128, 6336): Tile(2, 64, 32, 16, 8),
        (WHOLE, 128, 8448): Tile(2, 64, 64, 0, 8),
        (WHOLE, 128, 10560): Tile(2, 64, 64, 16, 7),
        (WHOLE, 192, 4224): Tile(1, 64, 128, 0, 8),
        (WHOLE, 192, 6336): Tile(1, 64, 128, 16, 6),
        (WHOLE, 256, 4224): Tile(2, 64, 64, 0, 8),
        (WHOLE, 256, 6336): Tile(2, 64, 64, 32, 7),
        (GATED, 64, 4224): Tile(1, 64, 64, 0, 8),
        (GATED, 64, 6336): Tile(1, 64, 64, 32, 8),
        (GATED, 64, 8448): Tile(1, 64, 128, 0, 8),
        (GATED, 64, 10560): Tile(1, 64, 128, 32, 7),
        (GATED, 64, 12672): Tile(1, 64, 128, 64, 5),
        (GATED, 64, 16896): Tile(1, 64, 128, 0, 8),
        (GATED, 64, 17952): Tile(1, 64, 256, 16, 5),
        (GATED, 64, 19008): Tile(1, 64, 128, 16, 7),
        (GATED, 64, ANY): Tile(1, 64, 128, 0, 8),
        (GATED, 128, 4224): Tile(2, 64, 64, 0, 8),
        (GATED, 128, 6336): Tile(2, 64, 64, 32, 7),
        (GATED, 128, 8448): Tile(2, 64, 128, 0, 6),
        (GATED, 128, 10560): Tile(2, 64, 128, 32, 6),
        (GATED, 128, 12672): Tile(2, 64, 128, 64, 5),
        (GATED, 128, 17952): Tile(2, 64, 256, 16, 4),
        (GATED, 192, 4224): Tile(3, 64, 64, 0, 6),
        (GATED, 192, 10560): Tile(3, 64, 128, 32, 5),
        (GATED, 192, 12672): Tile(3, 64, 128, 64, 4),
        (GATED, 192, 19008): Tile(3, 64, 128, 16, 5),
        (GATED, 256, 4224): Tile(2, 64, 64, 32, 7),
        (GATED, 256, 12672): Tile(2, 128, 128, 64, 4),
        (PARTS, 64, 2112): Tile(1, 64, 64, 0, 8),
        (PARTS, 64, 4224): Tile(1, 64, 64, 0, 10),
        (PARTS, 64, 5280): Tile(1, 64, 64, 16, 10),
        (PARTS, 64, ANY): Tile(1, 64, 128, 0, 8),
        (PARTS, 128, 2112): Tile(1, 64, 64, 0, 8),
        (PARTS, 128, 4224): Tile(2, 64, 64, 0, 8),
        (PARTS, 128, 5280): Tile(2, 64, 64, 16, 8),
        (PARTS, 128, ANY): Tile(2, 64, 128, 0, 6),
        (PARTS, 192, 1056): Tile(1, 64, 64, 0, 10),
        (PARTS, 192, 2112): Tile(1, 64, 64, 32, 9),
        (PARTS, 192, 4224): Tile(3, 64, 64, 0, 6),
        (PARTS, 192, 5280): Tile(3, 64, 128, 0, 5),
        (PARTS, 256, 1024): Tile(1, 64, 64, 0, 8),
        (PARTS, 256, 2112): Tile(2, 64, 64, 0, 8),
        (PARTS, 256, 4224): Tile(2, 64, 128, 0, 6),
    }
}


def matmul_sm90_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The same in torch, PARTS in one; shapes as in `matmul_sm90`."""
    y = torch.nn.functional.linear(x, weight, bias)
    return silu_mul_reference(y) if kind == GATED else y


@gluon.jit
def _store_lines(y, buffer, first_row, output, M, N, y_ptr, BOX: gl.constexpr):
    """Store y  # [rows, columns] of rows of x from first_row and outputs from `output`, 16 bytes a thread: by way of a
    buffer of this group's rows of x, of which all are multiplied."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    SWIZZLE: gl.constexpr = 2 * COLUMNS if COLUMNS > 8 else 0
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=2)
    lines = reinterpret(buffer, y.dtype, [ROWS, COLUMNS], LINES)
    barrier()  # the group's other warps have read the buffer
    lines.store(y)
    barrier()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    rows = box_rows(first_row, M, ROWS, BOX, gl.SliceLayout(1, layout))
    columns = output + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    target = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
    gl.store(target, lines.load(layout), mask=(columns < N)[None, :])


@gluon.jit
def _store(
    acc, ring, first_row, output, place, M, N, bias_ptr, y_ptr,
    BUFFER: gl.constexpr, GROUPS: gl.constexpr,
    HAS_BIAS: gl.constexpr, BOX: gl.constexpr, IS_GATED: gl.constexpr,
):  # fmt: skip
    """Store sums  # [rows, columns] of rows of x from first_row and outputs from `output`, gated if they are pairs.
    BUFFER: the group's first of x to store y by; y is 128 columns or fewer, a buffer has 64."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    if IS_GATED:
        sums, up = split_pairs(acc)
    else:
        sums = acc
    if HAS_BIAS:
        columns = output + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, sums.type.layout))
        is_output = columns < N
        sums += gl.load(bias_ptr + columns, mask=is_output & (place.part == 0), other=0.0).to(gl.float32)[None, :]
    if IS_GATED:
        if HAS_BIAS:
            up += gl.load(bias_ptr + N + columns, mask=is_output, other=0.0).to(gl.float32)[None, :]
        y = gate_up(sums, up, dtype)
    else:
        y = sums.to(dtype)
    y_ptr += place.part.to(gl.int64) * M * N
    if y.shape[1] > BLOCK_K:
        left, right = y.reshape([y.shape[0], 2, BLOCK_K]).permute((0, 2, 1)).split()
        _store_lines(left, ring.x.index(BUFFER), first_row, output, M, N, y_ptr, BOX)
        _store_lines(right, ring.x.index(BUFFER + GROUPS), first_row, output + BLOCK_K, M, N, y_ptr, BOX)
    else:
        _store_lines(y, ring.x.index(BUFFER), first_row, output, M, N, y_ptr, BOX)


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    ring,
    place,
    M,
    N,
    bias_ptr,
    y_ptr,
    GROUPS: gl.constexpr,
    BOX: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr,
    TAIL: gl.constexpr,
):
    """One consumer group: four warps, its rows of x and all of the tile's weights."""
    acc, tail = multiply(GROUP, ring, 0, place.num_blocks, TAIL)
    first_row = place.token + GROUP * ring.x.shape[1]
    if TAIL:
        tail_output = place.output + (acc.shape[1] // 2 if IS_GATED else acc.shape[1])
        _store(
            tail, ring, first_row, tail_output, place, M, N, bias_ptr, y_ptr,
            GROUP + 2 * GROUPS, GROUPS, HAS_BIAS, BOX, IS_GATED,
        )  # fmt: skip
    _store(
        acc, ring, first_row, place.output, place, M, N, bias_ptr, y_ptr,
        GROUP, GROUPS, HAS_BIAS, BOX, IS_GATED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def _matmul_sm90(
    x_desc,
    weight_desc,
    tail_desc,
    bias_ptr,
    y_ptr,
    M,
    N,
    num_blocks,
    part_blocks,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    TAIL: gl.constexpr = TAIL_N > 0
    OUTPUTS: gl.constexpr = (BLOCK_N + TAIL_N) // 2 if IS_GATED else BLOCK_N + TAIL_N
    # The last tile is moved back to where it is full.
    output = gl.minimum(gl.program_id(1) * OUTPUTS, gl.maximum(N - OUTPUTS, 0))
    part = gl.program_id(2)
    first_block = part * part_blocks
    blocks = gl.minimum(part_blocks, num_blocks - first_block)
    place = Place(gl.program_id(0) * (GROUPS * ROWS), output, part, first_block, blocks)

    ring = new_ring(x_desc.dtype, STAGES, GROUPS, ROWS, BLOCK_N, TAIL_N)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (0, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (produce, (x_desc, weight_desc, tail_desc, ring, place, M, GROUPS, BOX, IS_GATED, TAIL)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (_consume, (1, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (produce, (x_desc, weight_desc, tail_desc, ring, place, M, GROUPS, BOX, IS_GATED, TAIL)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (_consume, (1, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (_consume, (2, ring, place, M, N, bias_ptr, y_ptr, GROUPS, BOX, HAS_BIAS, IS_GATED, TAIL)),
                (produce, (x_desc, weight_desc, tail_desc, ring, place, M, GROUPS, BOX, IS_GATED, TAIL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


def find_tile(x: torch.Tensor, weight: torch.Tensor, kind: str) -> Tile | None:
    """The tile for a matmul of x  # [M, K] with a weight of this kind; None where torch is faster, or where these
    arguments, which are valid for torch's, do not fit this kernel. `kind`: WHOLE, GATED or PARTS."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if kind == GATED else weight.shape[0]
    if not MIN_ROWS <= rows <= MAX_ROWS or (kind == WHOLE and outputs < inputs):
        return None
    fits = is_loadable(x, weight) and (kind != GATED or outputs % PAIR.value == 0)
    found = (
        tile
        for (tile_kind, most_rows, most_outputs), tile in TILES["sm_90"].items()
        if fits and kind == tile_kind and rows <= most_rows and outputs <= most_outputs
    )
    tile = next(found, None)
    if tile is None or rows <= FEW_ROWS or weight.numel() <= SMALL_WEIGHT:
        return tile
    processors = num_multiprocessors(x.device)
    programs = prod(grid(tile, kind, rows, outputs, inputs, processors))
    return tile if programs >= MIN_FILL * cdiv(programs, processors) * processors else None


def grid(tile: Tile, kind: str, rows: int, outputs: int, inputs: int, processors: int) -> tuple[int, int, int]:
    """The launch's programs over rows of x, outputs and parts of K, which is split so far that they fill the GPU."""
    over_rows = cdiv(rows, tile.groups * tile.rows)
    over_outputs = cdiv(outputs, (tile.block_n + tile.tail_n) // (1 + (kind == GATED)))
    if kind != PARTS:
        return over_rows, over_outputs, 1
    blocks = cdiv(inputs, BLOCK_K.value)
    parts = max(1, min(MOST_PARTS, processors // (over_rows * over_outputs), blocks // MIN_PART_BLOCKS))
    return over_rows, over_outputs, cdiv(blocks, cdiv(blocks, parts))


def row_borders() -> list[int]:
    """Numbers of rows above which the kernel is another one, ascending."""
    return sorted({MIN_ROWS - 1} | {most_rows for _, most_rows, _ in TILES["sm_90"]} - {MAX_ROWS})


def num_registers(tile: Tile) -> tuple[int, int]:
    """Of a consumer's thread; and the mean over all threads, which a program is launched with.

    No more than needed: where a program takes all registers of its multiprocessor, programs of the next kernel, which
    start early, crowd on the few multiprocessors without one. The norm behind a matmul of 128 rows took 8 us more so.
    """
    sums = tile.rows * (tile.block_n + tile.tail_n) // 128
    consumer = min(sums + 56, 232)
    # the assembler asks for what one wgmma takes
    return consumer, max(mean_registers(tile.groups, consumer), tile.block_n // 2 + 32)


def matmul_sm90(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, kind: str
) -> torch.Tensor:
    """Multiply x  # [M, K] with weight  # [N, K] and add bias  # [N], with the tile that `find_tile` gave.

    Returns y  # [M, N] in x's dtype, contiguous; of GATED, whose weight is [2N, K] and bias [2N], silu(first half) *
    second half; of PARTS, where there is more than one, [S, M, N], whose sum over S is y. Raises ValueError for a wrong
    shape, dtype or device.
    """
    (rows, inputs), gated = x.shape, kind == GATED
    box = SMALL_BOX if tile.groups == 1 else tile.rows
    check_matmul(x, weight, bias, box)
    outputs = weight.shape[0] // (1 + gated)
    programs = grid(tile, kind, rows, outputs, inputs, num_multiprocessors(x.device))
    parts = programs[2]
    shape = (parts, rows, outputs) if parts > 1 else (rows, outputs)
    y = torch.empty(*shape, dtype=x.dtype, device=x.device)
    blocks = cdiv(inputs, BLOCK_K.value)
    consumer_registers, registers = num_registers(tile)
    _matmul_sm90[programs](
        TensorDescriptor(x, [rows, inputs], [x.stride(0), 1], [box, BLOCK_K.value], LAYOUT.value),
        weight_descriptor(weight, tile.block_n, gated),
        weight_descriptor(weight, tile.tail_n, gated) if tile.tail_n else None,
        bias,
        y,
        rows,
        outputs,
        blocks,
        cdiv(blocks, parts),
        GROUPS=tile.groups,
        ROWS=tile.rows,
        BOX=box,
        BLOCK_N=tile.block_n,
        TAIL_N=tile.tail_n,
        STAGES=tile.stages,
        HAS_BIAS=bias is not None,
        IS_GATED=gated,
        CONSUMER_REGISTERS=consumer_registers,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=registers,
        launch_pdl=True,
    )
    return y
