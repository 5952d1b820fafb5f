"""The prefill attention of Hopper (sm_90), in Gluon: what `attention_prefill` computes, with the overlap written out.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j]        j <= the place of t in its own text

Legend: T packed tokens, S sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row.
The arguments and their checks are those of `attention_prefill`; here there is no window, D is 64 or 128, and elements
have 2 bytes. Bound by matmul: 4 D flops for each (query, visible key). On an H200, 32/8 heads of 128, pages of 64
(bench/results/kernels.jsonl): 455 TFLOP/s for 16 x 1024 new tokens, 552 for 4 x 4096, 606 for 1 x 16384; the portable
kernel has 322, 417 and 465 there.

A tile is 128 queries of one head. One producer warp copies Q, K and V to shared memory by TMA; two consumer groups of
four warps have 64 queries each. A group issues the scores of block i together with the values of block i - 1, and does
the softmax of block i while the second still run; the other group's matmuls fill what is left. Stock Triton runs all
warps in step and waits there. Other choices, with what they were measured to give:
- Blocks of 128 keys: blocks of 64 lose 15-20% on long contexts.
- One program for each multiprocessor takes tile after tile, in snake order over tiles sorted by falling work. Two Q
  buffers let the next tile's copies run under this one's end: 17-25% at 16 x 1024, nothing at 1 x 16384.
- Page ids are loaded one block ahead: waiting for each costs a quarter of the speed.
- A block is copied in boxes of a page, or of 128 slots where a page has more: pages of 64 lose 0-3%, pages of 16 5-9%.
- Weights are rounded to 2 bytes where the next block begins: the assembler swaps the halves of pairs that live from one
  block to the next, and back, an eighth of the loop's instructions (1 x 16384: 572 TFLOP/s with them, 609 without).
- Blocks run from a tile's last to its first, so that those with a mask come before one long loop without.

A box is copied whole: behind a sequence's end come slots of others, or never written ones. Scores there are masked;
values are overwritten with zeros in shared memory, since they may be NaN, and 0 * NaN is NaN. So a key has its place in
a block, whatever the chunk, and a query's result has the same bits in every chunk.
The softmax is in hopper_softmax.py.
Source: Shah et al., "FlashAttention-3", 2024.
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

from minisgl.kernels.hopper import Address, async_load, barrier, reinterpret
from minisgl.kernels.hopper_softmax import rescale, softmax_block, thread_sums
from minisgl.kernels.launch import num_multiprocessors
from minisgl.kernels.paged import LOG2_E

BLOCK_M = gl.constexpr(128)  # queries of a tile: two consumer groups of 64, the rows of one wgmma
BLOCK_N = gl.constexpr(128)  # keys of a block
BOX_DIMS = gl.constexpr(64)  # columns of a TMA box: 128 bytes, the widest that shared memory is swizzled by
STAGES = {64: 4, 128: 2}  # buffers for K and for V, by head dim: 64 KB each; with Q, 208 KB of 227 at 128
Q_BUFFERS = gl.constexpr(2)
BUFFER_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
BOX_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


class Ring(NamedTuple):
    """Buffers that the producer fills in turn and the consumers empty; a barrier of each kind for each buffer."""

    data: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Index(NamedTuple):
    """Where the work is: index tensors of the launch, and how many turns of them this program has."""

    rows_ptr: gl.tensor
    cu_seqlens_ptr: gl.tensor
    kv_lens_ptr: gl.tensor
    tiles_ptr: gl.tensor
    num_turns: gl.tensor


class Work(NamedTuple):
    """One tile of one head."""

    head: gl.tensor
    row: gl.tensor
    token: gl.tensor  # packed token of the tile's first query
    num_queries: gl.tensor  # up to the sequence's end; may be more than the tile has
    place: gl.tensor  # of the first query in its own text
    kv_len: gl.tensor
    num_blocks: gl.tensor
    num_masked: gl.tensor  # of the last blocks; at least 1


@gluon.jit
def _allocate_ring(SHAPE: gl.constexpr, DTYPE: gl.constexpr, NUM_BUFFERS: gl.constexpr):
    """A ring of NUM_BUFFERS buffers; SHAPE  # [buffers, rows, D], a buffer of the ring may be several of these."""
    data = gl.allocate_shared_memory(DTYPE, SHAPE, BUFFER_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_BUFFERS):
        mbarrier.init(full.index(i), 1)  # the producer, once TMA has delivered the bytes
        mbarrier.init(empty.index(i), 2)  # both consumer groups
    return Ring(data, full, empty)


# `turn` counts the uses of a ring since the launch: use n of a buffer completes phase n of its barriers.
@gluon.jit
def _wait_full(ring, turn, pred=True):
    NUM_BUFFERS: gl.constexpr = ring.full.shape[0]
    mbarrier.wait(ring.full.index(turn % NUM_BUFFERS), (turn // NUM_BUFFERS) & 1, pred=pred)


@gluon.jit
def _wait_empty(ring, turn):
    NUM_BUFFERS: gl.constexpr = ring.empty.shape[0]
    # a fresh barrier counts as one whose phase 1 is over: the first use does not wait
    mbarrier.wait(ring.empty.index(turn % NUM_BUFFERS), ((turn // NUM_BUFFERS) & 1) ^ 1)


@gluon.jit
def _release(ring, turn):
    NUM_BUFFERS: gl.constexpr = ring.empty.shape[0]
    mbarrier.arrive(ring.empty.index(turn % NUM_BUFFERS))


@gluon.jit
def _work(turn, index, HEADS: gl.constexpr):
    """What this program does in its turn: heads are fastest, so those that share KV run together and find it in L2."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    item = turn * programs + (program if turn % 2 == 0 else programs - 1 - program)
    head = item % HEADS
    tile = item // HEADS
    sequence = gl.load(index.tiles_ptr + 2 + 2 * tile)
    block_start = gl.load(index.tiles_ptr + 2 + 2 * tile + 1) * BLOCK_M
    first_token = gl.load(index.cu_seqlens_ptr + sequence)
    query_len = gl.load(index.cu_seqlens_ptr + sequence + 1) - first_token
    kv_len = gl.load(index.kv_lens_ptr + sequence)
    row = gl.load(index.rows_ptr + sequence)
    place = kv_len - query_len + block_start
    num_blocks = (gl.minimum(kv_len, place + BLOCK_M) + BLOCK_N - 1) // BLOCK_N
    num_full = (place + 1) // BLOCK_N  # blocks that every query of the tile sees whole
    num_masked = gl.maximum(num_blocks - num_full, 1)
    token = first_token + block_start
    return Work(head, row, token, query_len - block_start, place, kv_len, num_blocks, num_masked)


@gluon.jit
def _box_pages(table_row, start, kv_len, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page of each box of the block at `start`; past the ends of a sequence any of its pages."""
    pages = gl.tuple([])
    for box in gl.static_range(BLOCK_N // BOX):
        key = gl.maximum(gl.minimum(start + box * BOX, kv_len - 1), 0)
        pages = pages + gl.tuple([gl.load(table_row + key // PAGE_SIZE)])
    return pages


@gluon.jit
def _load_block(
    desc, ring, turn, pages, start, column, HEAD_DIM: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr
):
    """Copy a block of keys or values, once its buffer is free. desc  # [P, page_size, K * D] in boxes [1, BOX, 64]."""
    NUM_BUFFERS: gl.constexpr = ring.full.shape[0]
    NUM_BOXES: gl.constexpr = BLOCK_N // BOX
    NUM_COLUMNS: gl.constexpr = HEAD_DIM // BOX_DIMS
    # The same bytes as [buffer, column of boxes, box]: a swizzled buffer has 64 dims of all its rows, then the next 64.
    shape: gl.constexpr = [NUM_BUFFERS * NUM_COLUMNS * NUM_BOXES, 1, BOX, BOX_DIMS]
    boxes = reinterpret(ring.data, desc.dtype, shape, BOX_LAYOUT)
    buffer = turn % NUM_BUFFERS
    full = ring.full.index(buffer)
    _wait_empty(ring, turn)
    mbarrier.expect(full, BLOCK_N * HEAD_DIM * 2)
    for box in gl.static_range(NUM_BOXES):
        slot = (start + box * BOX) % PAGE_SIZE if BOX < PAGE_SIZE else 0
        for i in gl.static_range(NUM_COLUMNS):
            target = boxes.index((buffer * NUM_COLUMNS + i) * NUM_BOXES + box)
            async_load(desc, [pages[box], slot, column + i * BOX_DIMS], full, target)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    page_table_ptr,
    page_table_stride,
    index,
    q_ring,
    k_ring,
    v_ring,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """The producer: one warp that copies all that both consumer groups read."""
    BOX: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    first_block = 0  # blocks of the turns before
    for turn in range(index.num_turns):
        work = _work(turn, index, HEADS)
        table_row = page_table_ptr + work.row.to(gl.int64) * page_table_stride
        column = work.head // (HEADS // KV_HEADS) * HEAD_DIM
        start = (work.num_blocks - 1) * BLOCK_N
        next_pages = _box_pages(table_row, start, work.kv_len, BOX, PAGE_SIZE)

        buffer = turn % Q_BUFFERS
        _wait_empty(q_ring, turn)
        mbarrier.expect(q_ring.full.index(buffer), BLOCK_M * HEAD_DIM * 2)
        for group in gl.static_range(2):
            first = work.token + group * (BLOCK_M // 2)
            target = q_ring.data.index(2 * buffer + group)
            async_load(q_desc, [first, work.head * HEAD_DIM], q_ring.full.index(buffer), target)

        for i in range(work.num_blocks):
            pages = next_pages
            next_pages = _box_pages(table_row, start - BLOCK_N, work.kv_len, BOX, PAGE_SIZE)
            _load_block(k_desc, k_ring, first_block + i, pages, start, column, HEAD_DIM, BOX, PAGE_SIZE)
            _load_block(v_desc, v_ring, first_block + i, pages, start, column, HEAD_DIM, BOX, PAGE_SIZE)
            start -= BLOCK_N
        first_block += work.num_blocks


@gluon.jit
def _as_operand(weights, q, acc):
    """A block's weights as the matmul with its values reads them: of q's type, where `acc` has its rows."""
    return gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@gluon.jit
def _attend_block(
    i, first_block, work, q, k_ring, v_ring, no_scores, places, scale_log2, weights, acc, row_max, row_sum,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of the tile's block i and values of block i - 1, whose weights are given, in flight together."""
    turn = first_block + i
    weights = _as_operand(weights, q, acc)
    K_BUFFERS: gl.constexpr = k_ring.full.shape[0]
    V_BUFFERS: gl.constexpr = v_ring.full.shape[0]
    # K of this block is there: the wait is in the block before
    scores = warpgroup_mma(
        q, k_ring.data.index(turn % K_BUFFERS).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    _wait_full(v_ring, turn - 1)
    acc = warpgroup_mma(weights, v_ring.data.index((turn - 1) % V_BUFFERS), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    _release(k_ring, turn)
    keys = (work.num_blocks - 1 - i) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, no_scores.type.layout))
    next_weights, row_max, row_sum, factors = softmax_block(scores, row_max, row_sum, scale_log2, places, keys, MASKED)
    # This wait's branch keeps the assembler from hoisting the next one, for the values, above the softmax.
    _wait_full(k_ring, turn + 1, pred=i + 1 < work.num_blocks)
    acc = warpgroup_mma_wait(0, [acc])
    _release(v_ring, turn - 1)
    return next_weights, rescale(acc, factors), row_max, row_sum


@gluon.jit
def _zero_values(v_ring, turn, num_keys):
    """Overwrite the values of a block behind its first num_keys, for one consumer group; the other writes the same."""
    NUM_BUFFERS: gl.constexpr = v_ring.full.shape[0]
    NUM_COLUMNS: gl.constexpr = v_ring.data.shape[2] // BOX_DIMS
    ROWS: gl.constexpr = 8  # after so many the swizzle starts again
    NUM_PIECES: gl.constexpr = BLOCK_N // ROWS
    shape: gl.constexpr = [NUM_BUFFERS * NUM_COLUMNS * NUM_PIECES, ROWS, BOX_DIMS]
    pieces = reinterpret(v_ring.data, v_ring.data.dtype, shape, BUFFER_LAYOUT)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    for i in range(num_keys // ROWS, NUM_PIECES):
        is_key = (i * ROWS + rows < num_keys)[:, None]
        for column in gl.static_range(NUM_COLUMNS):
            piece = pieces.index((turn % NUM_BUFFERS * NUM_COLUMNS + column) * NUM_PIECES + i)
            piece.store(gl.where(is_key, piece.load(layout), 0.0).to(piece.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    out_ptr,
    scale_log2,
    index,
    q_ring,
    k_ring,
    v_ring,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """One consumer group: four warps, half of a tile's queries."""
    ROWS: gl.constexpr = BLOCK_M // 2
    K_BUFFERS: gl.constexpr = k_ring.full.shape[0]
    V_BUFFERS: gl.constexpr = v_ring.full.shape[0]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # 16 bytes
    rows = GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score_layout))
    out_rows = GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout))
    out_offsets = out_rows[:, None] * (HEADS * HEAD_DIM) + dims[None, :]
    no_scores = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, score_layout)
    first_block = 0  # blocks of the turns before
    for turn in range(index.num_turns):
        work = _work(turn, index, HEADS)
        places = work.place + rows
        row_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, score_layout))
        row_sum = thread_sums(no_scores)
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, acc_layout)
        q = q_ring.data.index(turn % Q_BUFFERS * 2 + GROUP)

        _wait_full(q_ring, turn)
        _wait_full(k_ring, first_block)
        k = k_ring.data.index(first_block % K_BUFFERS).permute((1, 0))
        scores = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        _release(k_ring, first_block)
        last_start = (work.num_blocks - 1) * BLOCK_N
        keys = last_start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
        weights, row_max, row_sum, _ = softmax_block(scores, row_max, row_sum, scale_log2, places, keys, True)
        if work.kv_len - last_start < BLOCK_N:
            _wait_full(v_ring, first_block)
            _zero_values(v_ring, first_block, work.kv_len - last_start)
        _wait_full(k_ring, first_block + 1, pred=work.num_blocks > 1)
        for i in range(1, work.num_masked):
            weights, acc, row_max, row_sum = _attend_block(
                i, first_block, work, q, k_ring, v_ring, no_scores, places, scale_log2, weights, acc, row_max, row_sum,
                MASKED=True,
            )  # fmt: skip
        for i in range(work.num_masked, work.num_blocks):
            weights, acc, row_max, row_sum = _attend_block(
                i, first_block, work, q, k_ring, v_ring, no_scores, places, scale_log2, weights, acc, row_max, row_sum,
                MASKED=False,
            )  # fmt: skip
        _release(q_ring, turn)
        first_block += work.num_blocks
        _wait_full(v_ring, first_block - 1)
        weights = _as_operand(weights, q, acc)
        acc = warpgroup_mma(weights, v_ring.data.index((first_block - 1) % V_BUFFERS), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        _release(v_ring, first_block - 1)

        row_sum = gl.sum(row_sum, 1)
        # Every query has seen key 0: its sum is not 0.
        out = acc * (1.0 / gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout)))[:, None]
        out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), out_layout)
        tile_ptr = out_ptr + work.token.to(gl.int64) * (HEADS * HEAD_DIM) + work.head * HEAD_DIM
        gl.store(tile_ptr + out_offsets, out, mask=(out_rows < work.num_queries)[:, None])


# The index tensors are slices of one upload: their alignment changes from step to step and must not recompile.
@gluon.jit(
    do_not_specialize=[
        "page_table_ptr", "rows_ptr", "cu_seqlens_ptr", "kv_lens_ptr", "tiles_ptr", "page_table_stride",
    ]
)  # fmt: skip
def _attention_prefill_sm90(
    q_desc,
    k_desc,
    v_desc,
    page_table_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    tiles_ptr,
    out_ptr,
    scale_log2,
    page_table_stride,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    num_items = gl.load(tiles_ptr) * HEADS
    full_turns = num_items // programs
    last = program if full_turns % 2 == 0 else programs - 1 - program  # this program's place in the snake's last turn
    num_turns = full_turns + (last < num_items % programs).to(gl.int32)

    dtype: gl.constexpr = k_desc.dtype
    q_ring = _allocate_ring([2 * Q_BUFFERS, BLOCK_M // 2, HEAD_DIM], dtype, Q_BUFFERS)
    k_ring = _allocate_ring([STAGES, BLOCK_N, HEAD_DIM], dtype, STAGES)
    v_ring = _allocate_ring([STAGES, BLOCK_N, HEAD_DIM], dtype, STAGES)
    fence_async_shared()
    barrier()
    index = Index(rows_ptr, cu_seqlens_ptr, kv_lens_ptr, tiles_ptr, num_turns)
    gl.warp_specialize(
        [
            (_consume, (0, out_ptr, scale_log2, index, q_ring, k_ring, v_ring, HEADS, HEAD_DIM)),
            (_consume, (1, out_ptr, scale_log2, index, q_ring, k_ring, v_ring, HEADS, HEAD_DIM)),
            (
                _produce,
                (
                    q_desc,
                    k_desc,
                    v_desc,
                    page_table_ptr,
                    page_table_stride,
                    index,
                    q_ring,
                    k_ring,
                    v_ring,
                    HEADS,
                    KV_HEADS,
                    HEAD_DIM,
                    PAGE_SIZE,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@lru_cache(maxsize=1024)  # 5 us each, and every layer has the same two in every step
def _kv_descriptor(pointer: int, dtype: torch.dtype, shape: torch.Size) -> TensorDescriptor:
    num_pages, page_size, kv_heads, head_dim = shape
    slot = kv_heads * head_dim
    return TensorDescriptor(
        Address(pointer, dtype),
        [num_pages, page_size, slot],
        [page_size * slot, slot, 1],
        [1, min(page_size, BLOCK_N.value), BOX_DIMS.value],
        BOX_LAYOUT.value,
    )


def fits(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int) -> bool:
    """Whether this kernel takes such arguments; they are valid for `attention_prefill`."""
    return (
        window == 0
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in STAGES
        and k_cache.shape[1] >= 16
        and q.stride(0) > 0
        and q.stride(0) % 8 == 0
        and q.data_ptr() % 16 == k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0
    )


def attention_prefill_sm90(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens: torch.Tensor,
    kv_lens: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attention_prefill` for arguments that it has checked, that `fits` takes, and with at least one tile."""
    tokens, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    # Two consumer groups and the producer share 504: more than four boxes a block are too much for 24.
    consumer_registers, producer_registers = (240, 24) if BLOCK_N.value // page_size <= 4 else (232, 40)
    most_items = (tiles.shape[0] - 1) * heads
    _attention_prefill_sm90[(min(most_items, num_multiprocessors(q.device)),)](
        TensorDescriptor(
            q, [tokens, heads * head_dim], [q.stride(0), 1], [BLOCK_M.value // 2, head_dim], BUFFER_LAYOUT.value
        ),
        _kv_descriptor(k_cache.data_ptr(), k_cache.dtype, k_cache.shape),
        _kv_descriptor(v_cache.data_ptr(), v_cache.dtype, v_cache.shape),
        page_table,
        rows,
        cu_seqlens,
        kv_lens,
        tiles,
        out,
        scale * LOG2_E,
        page_table.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        STAGES=STAGES[head_dim],
        CONSUMER_REGISTERS=consumer_registers,
        PRODUCER_REGISTERS=producer_registers,
        num_warps=4,
    )
