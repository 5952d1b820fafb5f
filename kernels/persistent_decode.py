"""Decode attention for many sequences: no more programs than run at once, each with an equal share of all keys.

The same function as `attention_decode`, to the bit, and called by it. Where there are many (sequence, KV head) pairs,
splits are not needed to fill a GPU, and writing and combining them costs up to 10% (256 sequences of 650 keys and 8 KV
heads on an H200: 191 us with a program for each split, 175 here). So a program goes through its share block by block,
sequence after sequence, without a break in its loads, and merges the splits of a sequence in registers as they end.
Only a sequence that the border of two shares cuts is written in splits, which a second launch combines.

    share p of a KV head = the splits whose first block is one of blocks [T p / P, T (p + 1) / P)

Legend as in attention_decode.py; T blocks of keys of all sequences, P shares of each KV head. The borders follow from
the lengths, which every program reads; a block is of one sequence, so a sequence's last may be partly empty, and a
sequence of no keys has an empty one, whose result is zeros.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.decode_splits import Tile, combine_block, combine_splits, merge_split, splits_of
from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, next_power_of_2, num_multiprocessors
from minisgl.kernels.paged import LOG2_E, MASKED_SCORE, load_block, load_page_ids, online_softmax

PROGRAMS = 2  # of a multiprocessor: what its shared memory holds
LENGTHS = 256  # looked at together

# A place among all blocks as one number, so that finding it is one sum: sequence, block of it, block of all before.
BLOCK_BITS = tl.constexpr(24)
POSITION_BITS = tl.constexpr(26)
BLOCK_MASK = tl.constexpr((1 << 24) - 1)
POSITION_MASK = tl.constexpr((1 << 26) - 1)


@triton.jit
def _blocks_of(kv_lens_ptr, sequences, batch, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(blocks, blocks of a split) of sequences; past the last of the batch no blocks."""
    is_sequence = sequences < batch
    kv_len = tl.load(kv_lens_ptr + sequences, mask=is_sequence, other=0)
    _, begin, size, _ = splits_of(kv_len, WINDOW, BLOCK_N)
    return tl.where(is_sequence, _num_blocks(kv_len, begin, BLOCK_N), 0), size // BLOCK_N


@triton.jit
def _num_blocks(kv_len, begin, BLOCK_N: tl.constexpr):
    return tl.maximum((kv_len - begin + BLOCK_N - 1) // BLOCK_N, 1)


@triton.jit
def _place_of(border, sequences, begins, ends, per_split):
    """The first split that begins at block `border` of all or after it, as one number; 0 if not among these sequences,
    whose blocks are begins..ends - 1."""
    block = (border - begins + per_split - 1) // per_split * per_split
    past = begins + block >= ends  # then it is the next sequence's first
    place = tl.where(past, sequences + 1, sequences).to(tl.int64) << BLOCK_BITS
    place = (place | tl.where(past, 0, block)) << POSITION_BITS
    place |= tl.where(past, ends, begins + block)
    return tl.sum(tl.where((begins <= border) & (border < ends), place, 0), 0)


@triton.jit
def _share_of(
    share, num_shares, kv_lens_ptr, batch, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, LENGTHS: tl.constexpr
):
    """Where a share begins (sequence, block of it), its number of blocks, and where the next one begins."""
    total = tl.zeros([], tl.int64)
    for start in range(0, batch, LENGTHS):
        blocks, _ = _blocks_of(kv_lens_ptr, start + tl.arange(0, LENGTHS), batch, WINDOW, BLOCK_N)
        total += tl.sum(blocks, 0)
    first = total * share // num_shares
    last = total * (share + 1) // num_shares
    begin = tl.zeros([], tl.int64)
    end = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.int64)
    for start in range(0, batch, LENGTHS):
        sequences = start + tl.arange(0, LENGTHS)
        blocks, per_split = _blocks_of(kv_lens_ptr, sequences, batch, WINDOW, BLOCK_N)
        ends = before + tl.cumsum(blocks, 0)
        begin += _place_of(first, sequences, ends - blocks, ends, per_split)
        end += _place_of(last, sequences, ends - blocks, ends, per_split)
        before += tl.sum(blocks, 0)
    end = tl.where(last == total, (tl.zeros([], tl.int64) + batch << BLOCK_BITS + POSITION_BITS) | total, end)
    sequence = (begin >> BLOCK_BITS + POSITION_BITS).to(tl.int32)
    block = (begin >> POSITION_BITS & BLOCK_MASK).to(tl.int32)
    next_sequence = (end >> BLOCK_BITS + POSITION_BITS).to(tl.int32)
    next_block = (end >> POSITION_BITS & BLOCK_MASK).to(tl.int32)
    count = ((end & POSITION_MASK) - (begin & POSITION_MASK)).to(tl.int32)
    return sequence, block, count, next_sequence, next_block


@triton.jit(
    do_not_specialize=["page_table_ptr", "rows_ptr", "kv_lens_ptr", "page_table_stride", "max_splits", "batch"],
)
def _persistent_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    rows_ptr,
    kv_lens_ptr,
    partial_ptr,
    logsumexp_ptr,
    out_ptr,
    scale_log2,
    q_stride,
    page_table_stride,
    max_splits,
    batch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LENGTHS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    # The kernel before this one wrote q, k and v, but neither lengths nor pages: see dependent_launch.py.
    sequence, block, count, _, _ = _share_of(
        tl.program_id(0) // KV_HEADS, tl.num_programs(0) // KV_HEADS, kv_lens_ptr, batch, WINDOW, BLOCK_N, LENGTHS
    )
    sequence = tl.minimum(sequence, batch - 1)
    kv_len = tl.load(kv_lens_ptr + sequence)
    row = tl.load(rows_ptr + sequence)
    next_len = tl.load(kv_lens_ptr + tl.minimum(sequence + 1, batch - 1))
    next_row = tl.load(rows_ptr + tl.minimum(sequence + 1, batch - 1))
    _, keys_begin, _, num_splits = splits_of(kv_len, WINDOW, BLOCK_N)
    is_whole = (num_splits <= 1) | ((block == 0) & (count >= _num_blocks(kv_len, keys_begin, BLOCK_N)))
    table_row = page_table_ptr + row.to(tl.int64) * page_table_stride
    page = load_page_ids(table_row, keys_begin + block * BLOCK_N, kv_len, PAGE_SIZE, BLOCK_N)
    wait_for_previous_kernel(PDL)
    if count <= 0:
        return

    SLOT_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    GROUP: tl.constexpr = HEADS // KV_HEADS
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    # Of the split so far, and of the sequence's splits before it.
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    merged = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    merged_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    merged_sum = tl.zeros([BLOCK_G], tl.float32)
    for left in range(count - 1, -1, -1):
        first_key, keys_begin, size, _ = splits_of(kv_len, WINDOW, BLOCK_N)
        start = keys_begin + block * BLOCK_N
        k = load_block(k_ptr, page, start, first_key, kv_len, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v = load_block(v_ptr, page, start, first_key, kv_len, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        # In each block anew: kept, it takes registers that a second program needs.
        q_row = q_ptr + sequence.to(tl.int64) * q_stride
        q = tl.load(q_row + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        keys = start + tl.arange(0, BLOCK_N)
        visible = (keys >= first_key) & (keys < kv_len)
        is_last = start + BLOCK_N >= kv_len
        per_split = size // BLOCK_N
        ends_split = is_last | ((block + 1) % per_split == 0)
        here, split, here_whole = sequence.to(tl.int64), block // per_split, is_whole

        # The block after this one, whose page is asked for now; lengths and rows are known one sequence ahead.
        sequence = tl.where(is_last, tl.minimum(sequence + 1, batch - 1), sequence)
        block = tl.where(is_last, 0, block + 1)
        kv_len = tl.where(is_last, next_len, kv_len)
        row = tl.where(is_last, next_row, row)
        next_len = tl.load(kv_lens_ptr + tl.minimum(sequence + 1, batch - 1))
        next_row = tl.load(rows_ptr + tl.minimum(sequence + 1, batch - 1))
        _, keys_begin, _, num_splits = splits_of(kv_len, WINDOW, BLOCK_N)
        next_whole = (num_splits <= 1) | (left >= _num_blocks(kv_len, keys_begin, BLOCK_N))
        is_whole = (is_last & next_whole) | ((is_last == 0) & is_whole)
        table_row = page_table_ptr + row.to(tl.int64) * page_table_stride
        page = load_page_ids(table_row, keys_begin + block * BLOCK_N, kv_len, PAGE_SIZE, BLOCK_N)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(visible[None, :], scores, MASKED_SCORE)
        acc, row_max, row_sum = online_softmax(scores, v, acc, row_max, row_sum, scale_log2)
        if ends_split:
            partial = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
            logsumexp = row_max + tl.log2(row_sum)
            if here_whole:
                merged, merged_max, merged_sum = merge_split(merged, merged_max, merged_sum, partial, logsumexp)
                if is_last:
                    out = out_ptr + (here * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
                    y = merged / tl.where(merged_sum > 0, merged_sum, 1.0)[:, None]
                    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
                    merged = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
                    merged_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
                    merged_sum = tl.zeros([BLOCK_G], tl.float32)
            else:
                slots = (here * max_splits + split) * HEADS + heads
                tl.store(partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :], partial, mask=mask)
                tl.store(logsumexp_ptr + slots, logsumexp, mask=group < GROUP)
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_G], tl.float32)


@triton.jit(do_not_specialize=["kv_lens_ptr", "max_splits", "batch"])
def _combine_cut_kernel(
    partial_ptr,
    logsumexp_ptr,
    kv_lens_ptr,
    out_ptr,
    max_splits,
    batch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LENGTHS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combine the splits of the sequence that is cut between this share and the next, and not before."""
    before, block_before, _, sequence, block = _share_of(
        tl.program_id(1), tl.num_programs(1) + 1, kv_lens_ptr, batch, WINDOW, BLOCK_N, LENGTHS
    )
    is_first_cut = (block > 0) & ((before != sequence) | (block_before == 0))
    _, _, _, num_splits = splits_of(tl.load(kv_lens_ptr + sequence, mask=is_first_cut, other=0), WINDOW, BLOCK_N)
    wait_for_previous_kernel(PDL)
    if is_first_cut:
        combine_splits(
            partial_ptr, logsumexp_ptr, out_ptr, sequence.to(tl.int64), tl.program_id(0), num_splits, max_splits,
            HEADS, HEAD_DIM, BLOCK_S, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def persistent_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    partial: torch.Tensor,
    logsumexp: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    tile: Tile,
) -> None:
    """Launch the kernels. The arguments are those of `attention_decode`, checked; partial  # [B, S, H, D] and logsumexp
    # [B, S, H], both fp32, are a workspace."""
    batch, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    max_splits = partial.shape[1]
    shares = max(1, PROGRAMS * num_multiprocessors(q.device) // kv_heads)
    options = {"HEADS": heads, "HEAD_DIM": head_dim, "WINDOW": window, "BLOCK_N": tile.block_n, "LENGTHS": LENGTHS}
    options |= {"BLOCK_D": max(16, next_power_of_2(head_dim)), **dependent_launch(q.device)}
    _persistent_decode_kernel[(shares * kv_heads,)](
        q,
        k_cache,
        v_cache,
        page_table,
        rows,
        kv_lens,
        partial,
        logsumexp,
        out,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        max_splits,
        batch,
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        BLOCK_G=max(16, next_power_of_2(heads // kv_heads)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    if max_splits > 1 and shares > 1:
        block = combine_block(q.device)
        _combine_cut_kernel[(cdiv(heads, block["BLOCK_H"]), shares - 1)](
            partial, logsumexp, kv_lens, out, max_splits, batch, **block, **options
        )
