"""Causal attention over paged keys and values in one order of sums, for new tokens alone, in chunks or all at once.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j]        j <= i, and j > i - window when a window is given

Legend: T packed tokens, B sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row,
i the place of a token in its own text.
The arguments are those of `attention_prefill` and `attention_decode`, and so are the bounds: matmul, and memory.

The keys of a sequence are cut into splits of SPLIT keys from place 0, and a split into blocks. For one query:

    (max, sum, acc) of a split = online softmax over its blocks, in order
    (max, sum, acc)            = merge(merge(nothing, first split), next split) ...        out = acc / sum

`invariant_prefill` has one program for a block of queries of one head; it goes through the splits and merges.
`invariant_decode` has one program for each split, which serves all query heads of a KV head, and a second launch that
merges. Both do a split by the same function in blocks of the same shape, so the order of every sum is the same:
- By construction: splits and blocks are counted from place 0; a block whose keys a query does not see changes nothing
  (its weights are 0 and it rescales by 1), nor does a merge of nothing; products and sums are fused where the source
  says so, and nowhere else.
- Resting on the hardware: a row of a matmul has the same bits in each place of a block, whatever other rows hold, and
  adding products that are 0 changes nothing. The GPU tests compare.
So a token's result has the same bits whatever the chunk, the batch and the pages are. Heads are independent: sharding
them over ranks changes nothing either.
Sources: Dao, "FlashAttention-2", 2023; Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import architecture, check, use_triton
from minisgl.kernels.paged import LOG2_E, MASKED_SCORE, check_attention, check_index, load_block, load_page_ids

# Keys of a split: whole blocks of every tile. Smaller is faster for few short sequences, larger for few long ones.
SPLIT = 512

COMBINE_HEADS = 2  # of a program
COMBINE_WARPS = 1

# The compiler fuses no product with a sum by itself: it might do so in one kernel and not in another.
FUSION = {"enable_fp_fusion": False}


class Tile(NamedTuple):
    """Query rows and keys of a block, warps and pipeline stages; the same for both launches."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False  # load whole blocks by descriptor, where a page holds them


# By architecture and head dim, rounded up to 64, 128 or 256; for 2-byte types.
TILES: dict[str, dict[int, Tile]] = {
    "sm_90": {
        64: Tile(64, 64, 4, 3, tma=True),
        128: Tile(64, 64, 4, 3, tma=True),
        256: Tile(128, 64, 8, 2, tma=True),
    },
    "sm_80": {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 2)},
    "cpu": {64: Tile(16, 16, 4, 1, tma=True), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
SAFE_TILES = {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 1)}
# Exact fp32 has no tensor cores, and its blocks are twice as large: one small table fits everywhere.
FP32_TILES = {64: Tile(16, 16, 4, 2), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)}


def _tile(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tile:
    tiles = FP32_TILES if dtype.itemsize > 2 else TILES.get(architecture(device), SAFE_TILES)
    return tiles[max(64, triton.next_power_of_2(head_dim))]


def query_block(head_dim: int, device: torch.device, dtype: torch.dtype) -> int:
    """Queries of a tile of `invariant_prefill`: the `block` that `prefill_tiles` needs."""
    return _tile(head_dim, device, dtype).block_m


def invariant_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same in torch, a token at a time, so that tokens do not depend on others here either; shapes as in
    `invariant_prefill`. Returns out  # [T, H, D]."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    page_size, kv_heads, head_dim = k_cache.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    offsets = cu_seqlens.tolist()
    for sequence, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        if kv_len == 0:  # padding
            continue
        pages = page_table[row, : -(-kv_len // page_size)].long()
        keys, values = (cache[pages].flatten(0, 1).to(wide) for cache in (k_cache, v_cache))  # [L, K, D]
        first, end = offsets[sequence : sequence + 2]
        for token in range(first, end):
            place = kv_len - end + token
            seen = slice(max(0, place + 1 - window) if window else 0, place + 1)
            # Copied, as pages are above: libraries choose their code by alignment too.
            queries = q[token].to(wide, copy=True).view(kv_heads, -1, head_dim)  # [K, G, D]
            weights = (queries @ keys[seen].permute(1, 2, 0) * scale).softmax(-1)  # [K, G, keys]
            out[token] = (weights @ values[seen].transpose(0, 1)).flatten(0, 1).to(q.dtype)
    return out


@triton.jit
def _attend_blocks(
    q,
    places,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    column,
    table_row,
    scale_log2,
    begin,
    end,
    first_key,
    SLOT_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add keys begin..end-1 to a split in blocks; begin is a multiple of BLOCK_N, and so is end unless MASKED."""
    next_page = load_page_ids(table_row, begin, end, PAGE_SIZE, BLOCK_N)  # a block ahead: see attention_prefill.py
    for start in range(begin, end, BLOCK_N):
        page = next_page
        next_page = load_page_ids(table_row, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        if TMA and not MASKED:  # slots past a sequence's end may hold NaN, so that the last block needs a mask
            k = k_desc.load([page * PAGE_SIZE + start % PAGE_SIZE, column])
            v = v_desc.load([page * PAGE_SIZE + start % PAGE_SIZE, column])
        else:
            k = load_block(
                k_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED
            )
            v = load_block(
                v_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED
            )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            visible = keys[None, :] <= places[:, None]
            if WINDOW > 0:
                visible &= keys[None, :] > places[:, None] - WINDOW
            scores = tl.where(visible, scores, MASKED_SCORE)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = _shift(new_max)
        weights = tl.exp2(tl.fma(scores, scale_log2, -shift[:, None]))
        rescale = tl.exp2(row_max - shift)
        row_sum = tl.fma(row_sum, rescale, tl.sum(weights, 1))
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _shift(row_max):
    """What exponents are taken relative to: a row that has seen no key has the maximum -inf, and -inf - -inf is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _attend_split(
    q,
    places,
    first_place,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    column,
    table_row,
    scale_log2,
    begin,
    end,
    first_key,
    BLOCK_M: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """(acc, max, sum) of keys begin..end-1, all of one split, for queries at `places`, none before first_place."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    full_end = begin
    if WINDOW == 0:
        seen_by_all = (first_place + 1) // BLOCK_N * BLOCK_N  # every query sees all keys before it
        full_end = tl.maximum(tl.minimum(seen_by_all, end), begin)
        acc, row_max, row_sum = _attend_blocks(
            q, places, acc, row_max, row_sum, k_ptr, v_ptr, k_desc, v_desc, column, table_row, scale_log2,
            begin, full_end, first_key,
            SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA, MASKED=False,
        )  # fmt: skip
    return _attend_blocks(
        q, places, acc, row_max, row_sum, k_ptr, v_ptr, k_desc, v_desc, column, table_row, scale_log2,
        full_end, end, first_key,
        SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA, MASKED=True,
    )  # fmt: skip


@triton.jit
def _merge(acc, row_max, row_sum, split_acc, split_max, split_sum):
    """Add a split to those before it. A row without keys in the split stays as it is."""
    new_max = tl.maximum(row_max, split_max)
    shift = _shift(new_max)
    kept = tl.exp2(row_max - shift)
    added = tl.exp2(split_max - shift)
    acc = tl.fma(split_acc, added[:, None], acc * kept[:, None])
    return acc, new_max, tl.fma(split_sum, added, row_sum * kept)


@triton.jit
def _mean(acc, row_sum):
    """The output of rows; of a row without keys 0."""
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]


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
    sequence = tl.load(tiles_ptr + 2 * tile)
    block_start = tl.load(tiles_ptr + 2 * tile + 1) * BLOCK_M
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
        split_acc, split_max, split_sum = _attend_split(
            q, first_place + tl.arange(0, BLOCK_M), first_place, k_ptr + column, v_ptr + column, k_desc, v_desc,
            column, table_row, scale_log2, begin, tl.minimum(split * SPLIT + SPLIT, end_place), first_key,
            BLOCK_M, KV_HEADS * HEAD_DIM, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        acc, row_max, row_sum = _merge(acc, row_max, row_sum, split_acc, split_max, split_sum)
    out = out_ptr + tokens[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(out, _mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)


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
    acc, row_max, row_sum = _attend_split(
        q, tl.full([BLOCK_M], 0, tl.int32) + place, place, k_ptr + column, v_ptr + column, k_desc, v_desc,
        column, table_row, scale_log2,
        tl.maximum(start, first_key // BLOCK_N * BLOCK_N), tl.minimum(start + SPLIT, kv_len), first_key, BLOCK_M,
        KV_HEADS * HEAD_DIM, PAGE_SIZE, HEAD_DIM, WINDOW, BLOCK_N, BLOCK_D, TMA,
    )  # fmt: skip
    if num_splits <= 1:  # to merge it with nothing would change nothing
        out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out, _mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)
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
        acc, row_max, row_sum = _merge(acc, row_max, row_sum, split_acc, split_max, split_sum)
    out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, _mean(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)


def _descriptors(k_cache: torch.Tensor, v_cache: torch.Tensor, tile: Tile) -> tuple[TensorDescriptor | None, ...]:
    """Those of keys and values as [slots, K * D] in blocks of one head; None each where TMA does not take them."""
    _, page_size, _, head_dim = k_cache.shape
    aligned = k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0
    if not (tile.tma and aligned and page_size >= tile.block_n and head_dim == _block_d(head_dim)):
        return None, None
    return tuple(
        TensorDescriptor.from_tensor(cache.flatten(2).flatten(0, 1), [tile.block_n, head_dim])
        for cache in (k_cache, v_cache)
    )


def _block_d(head_dim: int) -> int:
    return int(max(16, triton.next_power_of_2(head_dim)))


def _options(q: torch.Tensor, k_cache: torch.Tensor, window: int, tile: Tile, tma: bool) -> dict[str, int | bool]:
    """What both launches have in common."""
    _, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "WINDOW": window,
        "SPLIT": SPLIT,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": _block_d(head_dim),
        "TMA": tma,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **FUSION,
    }


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
    """`attention_prefill`, with the same arguments but `tiles` from `prefill_tiles(..., query_block(...))` of this
    module: a token's result has the same bits in every chunk, and from `invariant_decode`."""
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_index("cu_seqlens", cu_seqlens, q.device, (rows.shape[0] + 1,))
    check_index("tiles", tiles, q.device, (None, 2))
    index = page_table, rows, cu_seqlens, kv_lens
    if not use_triton(q):
        out.copy_(invariant_attention_reference(q, k_cache, v_cache, *index, scale=scale, window=window))
        return
    if tiles.shape[0] == 0:
        return
    tile = _tile(q.shape[2], q.device, q.dtype)
    k_desc, v_desc = _descriptors(k_cache, v_cache, tile)
    _invariant_prefill_kernel[(tiles.shape[0] * q.shape[1],)](
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
        **_options(q, k_cache, window, tile, k_desc is not None),
    )


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
    check(rows.shape[0] == q.shape[0], f"rows: expected [{q.shape[0]}], got {list(rows.shape)}")
    check(max_kv_len >= 0, f"max_kv_len: expected 0 or more, got {max_kv_len}")
    batch, heads, head_dim = q.shape
    if not use_triton(q):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        index = page_table, rows, cu_seqlens, kv_lens
        out.copy_(invariant_attention_reference(q, k_cache, v_cache, *index, scale=scale, window=window))
        return
    if batch == 0:
        return
    tile = _tile(head_dim, q.device, q.dtype)
    kv_heads = k_cache.shape[2]
    max_splits = max(triton.cdiv(max_kv_len, SPLIT), 1)
    if window:  # wherever it begins in a split
        max_splits = min(max_splits, triton.cdiv(window - 1, SPLIT) + 1)
    partial = torch.empty(batch, max_splits, heads, head_dim, dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty(2, batch, max_splits, heads, dtype=torch.float32, device=q.device).unbind()
    k_desc, v_desc = _descriptors(k_cache, v_cache, tile)
    launch = dependent_launch(q.device)
    head_blocks = triton.cdiv(heads // kv_heads, tile.block_m)
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
        **_options(q, k_cache, window, tile, k_desc is not None),
        **launch,
    )
    if max_splits > 1:
        _merge_splits_kernel[(triton.cdiv(heads, COMBINE_HEADS), batch)](
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
            BLOCK_D=_block_d(head_dim),
            num_warps=COMBINE_WARPS,
            **FUSION,
            **launch,
        )
