"""Causal attention of a token of each sequence over paged keys and values in one order of sums: see
invariant_attention.py.

One program for each split of the keys serves all query heads of a KV head, and a second launch merges the splits.

Legend: B sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row.
Bound by memory: reads the keys and values once.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.invariant_attention import (
    FUSION,
    SPLIT,
    attend_split,
    block_d,
    descriptors,
    invariant_attention_reference,
    launch_options,
    mean,
    merge,
    tile_of,
)
from minisgl.kernels.launch import cdiv, check, use_triton
from minisgl.kernels.paged import LOG2_E, check_attention, check_decode

COMBINE_HEADS = 2  # of a program
COMBINE_WARPS = 1


@triton.jit
def _splits_of(kv_len, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """(first visible key, its split, number of splits from there) of a sequence's last token."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(kv_len - WINDOW, 0)
    first_split = first_key // SPLIT
    return first_key, first_split, tl.cdiv(kv_len, SPLIT) - first_split


@triton.jit(do_not_specialize=["page_table_ptr", "rows_ptr", "kv_lens_ptr", "page_table_stride", "max_splits"])
def _invariant_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    page_table_ptr,
    rows_ptr,
    kv_lens_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    scale_log2,
    q_stride,
    page_table_stride,
    max_splits,
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
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // HEAD_BLOCKS % KV_HEADS
    share = tl.program_id(0) // (HEAD_BLOCKS * KV_HEADS)
    sequence = tl.program_id(1).to(tl.int64)
    # The kernel before this one wrote q, k and v, but neither lengths nor pages: see dependent_launch.py.
    kv_len = tl.load(kv_lens_ptr + sequence)
    first_key, first_split, num_splits = _splits_of(kv_len, WINDOW, SPLIT)
    wait_for_previous_kernel(PDL)
    if share >= tl.maximum(num_splits, 1):  # the first split of an empty (padded) row writes zeros
        return
    table_row = page_table_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * page_table_stride
    column = kv_head * HEAD_DIM
    member = tl.program_id(0) % HEAD_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    in_group = member < GROUP
    heads = kv_head * GROUP + member
    dims = tl.arange(0, BLOCK_D)
    mask = in_group[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + sequence * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)

    place = kv_len - 1
    start = (first_split + share) * SPLIT
    acc, row_max, row_sum = attend_split(
        q, tl.full([BLOCK_M], 0, tl.int32) + place, place, k_ptr + column, v_ptr + column, k_desc, v_desc,
        column, table_row, scale_log2,
        tl.maximum(start, first_key // BLOCK_N * BLOCK_N), tl.minimum(start + SPLIT, kv_len), first_key, BLOCK_M,
        KV_HEADS * HEAD_DIM, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA,
    )  # fmt: skip
    if num_splits <= 1:  # to merge it with nothing would change nothing
        out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out, mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slots = (sequence * max_splits + share) * HEADS + heads
        tl.store(partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(max_ptr + slots, row_max, mask=in_group)
        tl.store(sum_ptr + slots, row_sum, mask=in_group)


@triton.jit(do_not_specialize=["kv_lens_ptr", "max_splits"])
def _merge_splits_kernel(
    partial_ptr,
    max_ptr,
    sum_ptr,
    kv_lens_ptr,
    out_ptr,
    max_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    _, _, num_splits = _splits_of(tl.load(kv_lens_ptr + sequence), WINDOW, SPLIT)
    wait_for_previous_kernel(PDL)
    if num_splits <= 1:  # written by the first launch
        return
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < HEADS
    dims = tl.arange(0, BLOCK_D)
    mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    for share in tl.range(num_splits, loop_unroll_factor=4):  # four splits' loads at once
        slots = (sequence * max_splits + share) * HEADS + heads
        split_acc = tl.load(partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        split_max = tl.load(max_ptr + slots, mask=is_head, other=float("-inf"))
        split_sum = tl.load(sum_ptr + slots, mask=is_head, other=0.0)
        acc, row_max, row_sum = merge(acc, row_max, row_sum, split_acc, split_max, split_sum)
    out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)


def invariant_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    *,
    scale: float,
    window: int = 0,
    cascade: None = None,
    out: torch.Tensor,
) -> None:
    """`attention_decode`, with the same arguments but no tiles of a cascade, which sum in another order: a token's
    result has the same bits in every batch, and from `invariant_prefill`."""
    check(cascade is None, "cascade: expected None")
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_decode(q, rows, max_kv_len)
    batch, heads, head_dim = q.shape
    if not use_triton(q):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        index = page_table, rows, cu_seqlens, kv_lens
        out.copy_(invariant_attention_reference(q, k_cache, v_cache, *index, scale=scale, window=window))
        return
    if batch == 0:
        return
    tile = tile_of(head_dim, q.device, q.dtype)
    kv_heads = k_cache.shape[2]
    max_splits = max(cdiv(max_kv_len, SPLIT), 1)
    if window:  # wherever it begins in a split
        max_splits = min(max_splits, cdiv(window - 1, SPLIT) + 1)
    partial = torch.empty(batch, max_splits, heads, head_dim, dtype=torch.float32, device=q.device)
    maxima, sums = (partial.new_empty(batch, max_splits, heads) for _ in range(2))
    k_desc, v_desc = descriptors(k_cache, v_cache, tile)
    launch = dependent_launch(q.device)
    head_blocks = cdiv(heads // kv_heads, tile.block_m)
    _invariant_decode_kernel[(max_splits * kv_heads * head_blocks, batch)](
        q,
        k_cache,
        v_cache,
        k_desc,
        v_desc,
        page_table,
        rows,
        kv_lens,
        partial,
        maxima,
        sums,
        out,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        max_splits,
        **launch_options(q, k_cache, window, tile, k_desc is not None),
        **launch,
    )
    if max_splits > 1:
        _merge_splits_kernel[(cdiv(heads, COMBINE_HEADS), batch)](
            partial,
            maxima,
            sums,
            kv_lens,
            out,
            max_splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WINDOW=window,
            SPLIT=SPLIT,
            BLOCK_H=COMBINE_HEADS,
            BLOCK_D=block_d(head_dim),
            num_warps=COMBINE_WARPS,
            **FUSION,
            **launch,
        )
