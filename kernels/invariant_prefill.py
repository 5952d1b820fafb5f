"""Causal attention of new tokens over paged keys and values in one order of sums: see invariant_attention.py.

One program for a block of queries of one head goes through the splits of the keys and merges them.

Legend: T packed tokens, B sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row.
Bound by matmul.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.invariant_attention import (
    attend_split,
    descriptors,
    invariant_attention_reference,
    launch_options,
    mean,
    merge,
    tile_of,
)
from minisgl.kernels.launch import use_triton
from minisgl.kernels.paged import LOG2_E, check_attention, check_index, write_chunks


# The index tensors are slices of one upload: their alignment changes from step to step and must not recompile.
@triton.jit(
    do_not_specialize=["page_table_ptr", "rows_ptr", "cu_seqlens_ptr", "kv_lens_ptr", "tiles_ptr", "page_table_stride"]
)
def _invariant_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    page_table_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    tiles_ptr,
    out_ptr,
    scale_log2,
    q_stride,
    page_table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    if tile >= tl.load(tiles_ptr):
        return
    sequence = tl.load(tiles_ptr + 2 + 2 * tile)
    block_start = tl.load(tiles_ptr + 2 + 2 * tile + 1) * BLOCK_M
    first_token = tl.load(cu_seqlens_ptr + sequence)
    query_len = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
    kv_len = tl.load(kv_lens_ptr + sequence)
    table_row = page_table_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * page_table_stride
    column = head // (HEADS // KV_HEADS) * HEAD_DIM

    queries = block_start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens = (first_token + queries).to(tl.int64)
    mask = (queries < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + head * HEAD_DIM + dims[None, :], mask=mask, other=0.0)

    first_place = kv_len - query_len + block_start
    end_place = tl.minimum(first_place + BLOCK_M, kv_len)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_place + 1 - WINDOW, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for split in range(first_key // SPLIT, tl.cdiv(end_place, SPLIT)):
        begin = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
        split_acc, split_max, split_sum = attend_split(
            q, first_place + tl.arange(0, BLOCK_M), first_place, k_ptr + column, v_ptr + column, k_desc, v_desc,
            column, table_row, scale_log2, begin, tl.minimum(split * SPLIT + SPLIT, end_place), first_key,
            BLOCK_M, KV_HEADS * HEAD_DIM, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        acc, row_max, row_sum = merge(acc, row_max, row_sum, split_acc, split_max, split_sum)
    out = out_ptr + tokens[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(out, mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)


def invariant_prefill(
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
    window: int = 0,
    out: torch.Tensor,
) -> None:
    """`attention_prefill`, with the same arguments but `tiles` from `prefill_tiles(..., query_block(...))` of
    invariant_attention.py: a token's result has the same bits in every chunk, and from `invariant_decode`."""
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_index("cu_seqlens", cu_seqlens, q.device, (rows.shape[0] + 1,))
    check_index("tiles", tiles, q.device, (None, 2))
    index = page_table, rows, cu_seqlens, kv_lens
    if not use_triton(q):
        result = invariant_attention_reference(q, k_cache, v_cache, *index, scale=scale, window=window)
        write_chunks(out, result, cu_seqlens)
        return
    if tiles.shape[0] == 1:
        return
    tile = tile_of(q.shape[2], q.device, q.dtype)
    k_desc, v_desc = descriptors(k_cache, v_cache, tile)
    _invariant_prefill_kernel[((tiles.shape[0] - 1) * q.shape[1],)](
        q,
        k_cache,
        v_cache,
        k_desc,
        v_desc,
        *index,
        tiles,
        out,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        **launch_options(q, k_cache, window, tile, k_desc is not None),
    )
