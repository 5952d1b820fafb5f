"""Attention of one new token for each sequence over paged keys and values, split over the keys.

    out[b] = sum_j softmax_j(scale * q[b] . k[j]) v[j]       j < kv_len, and j >= kv_len - window when a window is given

Legend: B sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row.
Bound by memory: keys and values are read once, 4 K D bytes a key in bf16.

One program reads one split of one sequence's keys for one KV head and serves all query heads of that KV head, packed as
the rows of a matmul (padded to 16). A second launch combines the splits by their log-sum-exp, or, where that is faster,
the last program to finish with a sequence's KV head; a sequence with a single split writes its output at once. The grid
is bounded by `max_kv_len`: programs past a sequence's last split leave at once, so one bound can be captured in a
graph. Of many sequences, a program reads all splits of a short context and merges them as it goes (see
decode_splits.py); these are best ordered by length, the longest first.
Splits depend on the sequence's own visible keys, never on the batch or on the grid, and they are merged in their order,
so a sequence's result is the same bit for bit whatever runs beside it.
Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.attention_cascade import CascadeTiles, attention_cascade
from minisgl.kernels.decode_splits import (
    LEAST_SPLIT,
    combine_block,
    combine_parts,
    decode_tile,
    finish_merge,
    max_parts_of,
    merge_split,
    parts_of,
    splits_of,
)
from minisgl.kernels.dependent_launch import dependent_launch, prefetch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, check_same, next_power_of_2, num_multiprocessors, use_triton
from minisgl.kernels.paged import (
    LOG2_E,
    MASKED_SCORE,
    check_attention,
    check_decode,
    load_block,
    load_page_ids,
    online_softmax,
)
from minisgl.kernels.rotary import Rotary, check_rotary, load_heads, rotary_store_reference, rotate_heads, store_kv

# Pairs of sequence and KV head that are many: they fill a GPU alone. On an H200, with 32 / 8 heads and the longest
# first, 48 sequences of 1,384 keys take 74.7 us instead of 72.4, 80 of 1,274 100.4 instead of 107.9, 256 of 635 156.4
# instead of 189.8. Just above 64 sequences of 8 KV heads, to which graphs pad as few as 33.
MANY = 520
# Where no sequence sees more keys than FEW_KEYS, so many are many: no program reads for long, and no launch combines. A
# layer of Qwen3-8B takes 4 to 6% less with 20 to 32 sequences of 300 keys, 1 to 3% with as many of 560, 5 to 11% with
# 36 to 64 of either; one of 0.6B 7 to 11%, 2% more to 3% less, 5 to 22%. With 1,000 (up to 1,750), as many of 0.6B take
# 11 to 14% more, and 7% more to 2% less.
MANY_OF_FEW_KEYS, FEW_KEYS = 256, 1024
# Keys that a program asks for before it waits. With rotary inside, where no multiprocessor has two programs: of more,
# 16 x 560 take 5% longer. Else the programs that run first ask for few, while rotary ends: a decode step of Qwen3-0.6B
# is 0.1 to 0.5% shorter so on an H200 (32 to 256 rows), and up to 0.7% longer where they ask for 128 keys.
PREFETCH_ALONE, PREFETCH_FIRST = 256, 32
FIRST_PROGRAMS = 2  # of a multiprocessor: so many run at once
# Numbers of sequences whose splits the last program combines, and the most splits of one. On an H200 a layer of
# Qwen3-0.6B takes 2 to 6% less so with 2 sequences, 0 to 4% with 4 and 8; one of 8B 1 to 2%, of 14B as long as before.
# A sequence alone takes 6% more of 8B, and 16 take 1 to 2% more of 0.6B.
MERGED, MERGED_SPLITS = range(2, 9), 8


def num_arrivals(kv_heads: int) -> int:
    """The size of `arrivals` for any batch of `attention_decode_rotary`."""
    return MERGED[-1] * kv_heads


def many_sequences(kv_heads: int, visible: int) -> int:
    """The number of sequences from which `attention_decode` reads a short context in one program, which is another
    kernel; `visible` bounds the keys that one sees."""
    return cdiv(MANY if visible > FEW_KEYS else min(MANY, MANY_OF_FEW_KEYS), kv_heads)


def kinds_of_batches(kv_heads: int, most_rotated: int, max_len: int) -> set[tuple[int, int]]:
    """Numbers of sequences and bounds on their keys that between them launch every kernel for contexts up to max_len:
    of up to most_rotated sequences `attention_decode_rotary`, of more `attention_decode`."""
    whole = {(many_sequences(kv_heads, bound), bound) for bound in (FEW_KEYS, max_len)}
    # The smallest and the largest grids of each kind: small ones ask for keys ahead.
    merged = {(MERGED[0], 2 * LEAST_SPLIT.value), (min(MERGED[-1], most_rotated), MERGED_SPLITS * LEAST_SPLIT.value)}
    apart = {(size, bound) for size in (1, most_rotated) for bound in (1, max_len)}
    return {(size, min(bound, max_len)) for size, bound in whole | merged | apart}


def attention_decode_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same in torch, all sequences padded to the longest; shapes as in `attention_decode`. Returns [B, H, D]."""
    batch, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    num_pages = -(-int(kv_lens.max()) // page_size) if batch else 0
    lens = kv_lens.long()[:, None]  # [B, 1]
    stored = torch.arange(num_pages, device=q.device) * page_size < lens
    row = torch.where(kv_lens > 0, rows, 0).long()
    pages = page_table[row, :num_pages].long().masked_fill(~stored, 0)  # [B, pages]
    key = torch.arange(num_pages * page_size, device=q.device)
    hidden = key >= lens  # [B, L]
    if window:
        hidden |= key < lens - window

    k, v = (
        cache.index_select(0, pages.flatten()).view(batch, -1, kv_heads, head_dim).to(wide)
        for cache in (k_cache, v_cache)
    )  # [B, L, K, D]
    v = v.masked_fill(hidden[:, :, None, None], 0)  # so that a sequence of no keys gets zeros, and garbage stays out
    queries = q.to(wide).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = queries @ k.permute(0, 2, 3, 1) * scale  # [B, K, G, L]
    weights = scores.masked_fill(hidden[:, None, None, :], torch.finfo(wide).min).softmax(-1)
    return (weights @ v.transpose(1, 2)).reshape(q.shape).to(q.dtype)


@triton.jit
def _prefetch_keys(
    k_ptr,
    v_ptr,
    table_row,
    begin,
    first_key,
    end,
    SLOT_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MOST: tl.constexpr,
):
    """Ask for the keys and values of a split, or of its first MOST, to be brought to the L2 cache."""
    LINE: tl.constexpr = 128 * 8 // k_ptr.dtype.element_ty.primitive_bitwidth  # elements of a cache line
    keys = begin + tl.arange(0, MOST)
    readable = (keys >= first_key) & (keys < end)
    pages = tl.load(table_row + keys // PAGE_SIZE, mask=readable, other=0).to(tl.int64)
    lines = tl.minimum(tl.arange(0, triton.next_power_of_2(triton.cdiv(HEAD_DIM, LINE))) * LINE, HEAD_DIM - 1)
    offsets = (pages * PAGE_SIZE + keys % PAGE_SIZE)[:, None] * SLOT_STRIDE + lines[None, :]
    prefetch(k_ptr + offsets)
    prefetch(v_ptr + offsets)


@triton.jit(
    do_not_specialize=[
        "page_table_ptr",
        "rows_ptr",
        "kv_lens_ptr",
        "shared_splits_ptr",
        "page_table_stride",
        "max_parts",
    ],
)
def _attention_decode_kernel(
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
    max_parts,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    shared_splits_ptr,
    arrivals_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr,  # q is raw, with this token's raw key and value after it: norm, rotate and store them first
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_SHARED: tl.constexpr,  # the first shared_splits of a sequence are computed by `attention_cascade`
    IS_MANY: tl.constexpr,  # of sequences: a program reads a part of `parts_of` and not a split; not with HAS_SHARED
    MERGES: tl.constexpr,  # the last program to finish combines the splits; not with HAS_SHARED
    PREFETCH: tl.constexpr,  # keys that each of the first PREFETCHING programs asks for ahead; 0: none
    PREFETCHING: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS
    sequence = tl.program_id(1).to(tl.int64)
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    # The kernel before this one wrote q, k and v, but neither lengths nor pages: see dependent_launch.py.
    kv_len = tl.load(kv_lens_ptr + sequence)
    table_row = page_table_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * page_table_stride
    first_key, keys_begin, split_size, num_parts = splits_of(kv_len, WINDOW, BLOCK_N)
    part_size = split_size
    if IS_MANY:
        part_size, num_parts = parts_of(kv_len, keys_begin, split_size)
    begin = keys_begin + part * part_size
    end = tl.minimum(begin + part_size, kv_len)
    shared_splits = 0
    if HAS_SHARED:
        shared_splits = tl.load(shared_splits_ptr + sequence)
        end = tl.where(part < shared_splits, begin, end)  # nothing to read here
    SLOT_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    if PREFETCH > 0:
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if place < PREFETCHING:
            _prefetch_keys(k_ptr, v_ptr, table_row, begin, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, PREFETCH)
    next_page = load_page_ids(table_row, begin, end, PAGE_SIZE, BLOCK_N)
    wait_for_previous_kernel(PDL)
    if (part >= tl.maximum(num_parts, 1)) | (part < shared_splits):  # the first of an empty (padded) row writes zeros
        return

    GROUP: tl.constexpr = HEADS // KV_HEADS
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    in_group = group < GROUP
    mask = in_group[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr += sequence * q_stride
    if ROTARY:
        last = tl.maximum(kv_len - 1, 0)  # where the token stands
        angles = cos_sin_ptr + last.to(tl.int64) * HEAD_DIM
        loaded = load_heads(q_ptr + heads * HEAD_DIM, in_group, angles, q_norm_ptr, HEAD_DIM, BLOCK_D, HAS_Q_NORM)
        if part == num_parts - 1:  # the one program of this KV head that attends to the new key
            slot = tl.load(table_row + last // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + last % PAGE_SIZE
            store_kv(
                q_ptr + (HEADS + kv_head) * HEAD_DIM + group * 0, group == 0, slot * KV_HEADS + group * 0,
                angles, k_ptr, v_ptr, k_norm_ptr, eps, KV_HEADS, HEAD_DIM, BLOCK_D, HAS_K_NORM,
            )  # fmt: skip
            tl.debug_barrier()  # before other threads read it back
        q = rotate_heads(loaded, eps, HEAD_DIM, BLOCK_D, HAS_Q_NORM).to(q_ptr.dtype.element_ty)
    else:
        q = tl.load(q_ptr + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)

    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    part_acc, part_max, part_sum = acc, row_max, row_sum  # of the part's splits before this one
    for start in range(begin, end, BLOCK_N):
        page = next_page
        next_page = load_page_ids(table_row, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        k = load_block(k_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v = load_block(v_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        keys = start + tl.arange(0, BLOCK_N)
        visible = (keys >= first_key) & (keys < end)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(visible[None, :], scores, MASKED_SCORE)
        acc, row_max, row_sum = online_softmax(scores, v, acc, row_max, row_sum, scale_log2)
        if IS_MANY:
            following = start + BLOCK_N
            if ((following - keys_begin) % split_size == 0) | (following >= end):
                partial, logsumexp = finish_merge(acc, row_max, row_sum)
                part_acc, part_max, part_sum = merge_split(part_acc, part_max, part_sum, partial, logsumexp)
                acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
                row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
                row_sum = tl.zeros([BLOCK_G], tl.float32)

    if IS_MANY:
        acc, logsumexp = finish_merge(part_acc, part_max, part_sum)
    else:
        acc, logsumexp = finish_merge(acc, row_max, row_sum)
    if num_parts <= 1:
        out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slots = (sequence * max_parts + part) * HEADS + heads
        tl.store(partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(logsumexp_ptr + slots, logsumexp, mask=in_group)
        if MERGES:
            tl.debug_barrier()  # all threads have stored theirs before one of them tells
            arrived = arrivals_ptr + sequence * KV_HEADS + kv_head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == num_parts - 1:
                tl.store(arrived, 0)
                combine_parts(
                    partial_ptr, logsumexp_ptr, out_ptr, sequence, kv_head * GROUP, (kv_head + 1) * GROUP,
                    num_parts, max_parts, HEADS, HEAD_DIM, BLOCK_S, triton.next_power_of_2(GROUP), BLOCK_D,
                )  # fmt: skip


@triton.jit(do_not_specialize=["kv_lens_ptr", "max_parts"])
def _combine_kernel(
    partial_ptr,
    logsumexp_ptr,
    kv_lens_ptr,
    out_ptr,
    max_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_MANY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + sequence)
    _, begin, split_size, num_parts = splits_of(kv_len, WINDOW, BLOCK_N)
    if IS_MANY:
        _, num_parts = parts_of(kv_len, begin, split_size)
    wait_for_previous_kernel(PDL)
    if num_parts <= 1:  # written by the first launch
        return
    combine_parts(
        partial_ptr, logsumexp_ptr, out_ptr, sequence, tl.program_id(0) * BLOCK_H, HEADS, num_parts, max_parts,
        HEADS, HEAD_DIM, BLOCK_S, BLOCK_H, BLOCK_D,
    )  # fmt: skip


def attention_decode(
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
    cascade: CascadeTiles | None = None,
    out: torch.Tensor,
) -> None:
    """Write the attention of one query a sequence over its pages into `out`.

    q  # [B, H, D], sequences any stride apart; k_cache, v_cache  # [P, page_size, K, D], one layer, contiguous.
    page_table  # [R, M]; rows  # [B] page_table row of each sequence; kv_lens  # [B] keys, the current token's too; all
    int32. A sequence of 0 keys (padding) gets zeros and reads nothing. max_kv_len: a bound on kv_lens known on the
    host; it bounds the grid. window: keys a token sees, itself included; 0 is all. cascade: which sequences compute a
    shared prefix together (see attention_cascade.py), in a launch of its own; not for windows. out  # [B, H, D]
    contiguous. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_decode(q, rows, max_kv_len)
    if not use_triton(q):
        out.copy_(
            attention_decode_reference(q, k_cache, v_cache, page_table, rows, kv_lens, scale=scale, window=window)
        )
    else:
        _launch(q, k_cache, v_cache, page_table, rows, kv_lens, max_kv_len, scale, window, out, None, None, cascade)


def attention_decode_rotary(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    rotary: Rotary,
    arrivals: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    out: torch.Tensor,
) -> None:
    """`rotary_store` of each sequence's new token, then `attention_decode`, in one launch and with the same result.

    For few sequences: each program rotates q again. With 16 / 8 heads on an H200, 8 of 300 keys take 9.1 us (apart
    9.8), 16 take 14.1 (13.7), and 32 take 23.6 (21.3). Of many, each program reads its first keys later: with the
    matmul before and the norm behind, 128 of 1,074 keys take 140.3 us (139.0), 256 of 613 take 165.4 (161.0).
    qkv  # [B, (H + 2K) * D], of the tokens at places kv_lens - 1; only q is looked at for a sequence of 0 keys.
    arrivals  # [A] int32, A >= num_arrivals(K): zeros, which are zeros again at the end; launches that may run at the
    same time need their own. The rest as in `attention_decode` and `rotary_store`; `qkv` stays as it is.
    """
    heads = check_rotary(qkv, k_cache, v_cache, rotary)
    kv_heads, head_dim = k_cache.shape[2:]
    check_same("arrivals", arrivals, device=qkv.device, dtype=torch.int32)
    if arrivals.numel() < num_arrivals(kv_heads) or not arrivals.is_contiguous():
        raise ValueError(f"arrivals: expected [{num_arrivals(kv_heads)}] or more, contiguous")
    q = qkv[:, : heads * head_dim].unflatten(-1, (heads, head_dim))
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_decode(q, rows, max_kv_len)
    if use_triton(qkv):
        _launch(
            q, k_cache, v_cache, page_table, rows, kv_lens, max_kv_len, scale, window, out, rotary, arrivals, None
        )  # fmt: skip
        return
    positions = (kv_lens - 1).clamp_min(0)
    page_size = k_cache.shape[1]
    pages = page_table[rows.clamp_min(0), positions // page_size]
    slots = torch.where(kv_lens > 0, pages * page_size + positions % page_size, -1)
    q = rotary_store_reference(qkv.clone(), positions, slots, k_cache, v_cache, rotary)
    out.copy_(attention_decode_reference(q, k_cache, v_cache, page_table, rows, kv_lens, scale=scale, window=window))


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    scale: float,
    window: int,
    out: torch.Tensor,
    rotary: Rotary | None,
    arrivals: torch.Tensor | None,
    cascade: CascadeTiles | None,
) -> None:
    """Launch the kernels; the arguments are checked."""
    batch, heads, head_dim = q.shape
    if batch == 0:
        return
    _, page_size, kv_heads, _ = k_cache.shape
    tile = decode_tile(head_dim, q.device, q.dtype)
    block_d = max(16, next_power_of_2(head_dim))
    if window or max_parts_of(max_kv_len, window, tile.block_n, many=False) == 1:
        cascade = None
    visible = min(max_kv_len, window) if window else max_kv_len
    many = cascade is None and rotary is None and batch >= many_sequences(kv_heads, visible)
    max_parts = max_parts_of(max_kv_len, window, tile.block_n, many)
    merges = arrivals is not None and batch in MERGED and 1 < max_parts <= MERGED_SPLITS
    partial = torch.empty(batch, max_parts, heads, head_dim, dtype=torch.float32, device=q.device)
    logsumexp = torch.empty(batch, max_parts, heads, dtype=torch.float32, device=q.device)
    inputs = q, k_cache, v_cache, page_table, rows, kv_lens
    if cascade is not None:
        attention_cascade(*inputs, cascade, partial, logsumexp, scale=scale)
    launch, block = dependent_launch(q.device), combine_block(q.device)
    processors, programs = num_multiprocessors(q.device), max_parts * kv_heads * batch
    prefetch = 0
    if launch["PDL"] and cascade is None:
        prefetch = PREFETCH_FIRST if rotary is None else PREFETCH_ALONE if programs <= processors else 0
    _attention_decode_kernel[(max_parts * kv_heads, batch)](
        *inputs,
        partial,
        logsumexp,
        out,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        max_parts,
        *(rotary or (None, None, None, 0.0)),
        cascade.shared_splits if cascade is not None else None,
        arrivals,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=window,
        BLOCK_G=max(16, next_power_of_2(heads // kv_heads)),
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        ROTARY=rotary is not None,
        HAS_Q_NORM=rotary is not None and rotary.q_norm is not None,
        HAS_K_NORM=rotary is not None and rotary.k_norm is not None,
        HAS_SHARED=cascade is not None,
        IS_MANY=many,
        MERGES=merges,
        PREFETCH=prefetch,
        PREFETCHING=FIRST_PROGRAMS * processors,
        BLOCK_S=block["BLOCK_S"],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch,
    )
    if max_parts == 1 or merges:
        return
    _combine_kernel[(cdiv(heads, block["BLOCK_H"]), batch)](
        partial,
        logsumexp,
        kv_lens,
        out,
        max_parts,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WINDOW=window,
        IS_MANY=many,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        **block,
        **launch,
    )
