"""Causal attention of new tokens over paged keys and values: ragged, prefix-aware, with an optional sliding window.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j]        j <= i, and j > i - window when a window is given
    i = kv_len - query_len + (t - cu_seqlens[s])              the place of packed token t of sequence s in its own text

Legend: T packed tokens, S sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row.
The new tokens' own keys and values are already in the cache. Bound by matmul: 4 D flops for each (query, visible key).

One program does one tile: BLOCK_M queries of one sequence and one head. The host lists the tiles (`prefill_tiles`),
longest first; how many there are is read on the device, so that a captured launch serves every list up to its own size.
Heads are the fastest place of the grid, so heads that share KV run together and find it in L2.
Only the blocks of keys on the diagonal and at the window's edge mask scores: they do so under a branch, since a loop of
their own fills and drains the pipeline once more (at 16 x 1024 on an H200, 327 against 316 TFLOP/s). Scores and sums
are fp32. A token's result depends on its own sequence alone, but a prompt in chunks has other tiles than the whole
prompt: the two agree to rounding, not bit for bit. Hopper has a kernel of its own for common shapes, in
attention_prefill_sm90.py; the one here runs everywhere.
Source: Dao, "FlashAttention-2", 2023; Kwon et al., "PagedAttention", 2023.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture, hopper_module, next_power_of_2, use_triton
from minisgl.kernels.paged import (
    LOG2_E,
    MASKED_SCORE,
    check_attention,
    check_index,
    load_block,
    load_page_ids,
    online_softmax,
    write_chunks,
)


def attention_prefill_reference(
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
    """The same in torch, one sequence at a time; shapes as in `attention_prefill`. Returns out  # [T, H, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_cache.shape[2]
    offsets = cu_seqlens.tolist()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for s, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        tokens = slice(offsets[s], offsets[s + 1])
        query_len = offsets[s + 1] - offsets[s]
        if query_len == 0 or kv_len == 0:  # padding
            continue
        pages = page_table[row, : -(-kv_len // k_cache.shape[1])].long()
        queries = q[tokens].to(wide).transpose(0, 1)  # [H, query_len, D]
        keys, values = (
            cache[pages].flatten(0, 1)[:kv_len].to(wide).repeat_interleave(group, 1).transpose(0, 1)
            for cache in (k_cache, v_cache)
        )  # [H, kv_len, D]
        if query_len == kv_len and window == 0:
            mask = None
        else:
            place = torch.arange(kv_len - query_len, kv_len, device=q.device)[:, None]
            key = torch.arange(kv_len, device=q.device)
            mask = key <= place
            if window:
                mask &= key > place - window
        result = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scale
        )
        out[tokens] = result[0].transpose(0, 1).to(q.dtype)
    return out


class Tile(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0  # of a thread, on NVIDIA GPUs; 0: the compiler's choice


# By architecture and head dim, rounded up to 64, 128 or 256; for 2-byte types. On sm_90 the queries of a tile are those
# of the kernel in attention_prefill_sm90.py: which of the two runs is not known when the host lists the tiles.
TILES: dict[str, dict[int, Tile]] = {
    "sm_90": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2, 128), 256: Tile(128, 64, 8, 2)},
    "sm_80": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "sm_100": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "sm_120": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
    "gfx942": {64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 4, 2), 256: Tile(64, 32, 4, 2)},
    "cpu": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
}
SAFE_TILES = TILES["gfx942"]  # an architecture without a table: the smallest shared memory of all, 64 KB, holds them
# Exact fp32 has no tensor cores, and its blocks are twice as large: one small table fits everywhere.
FP32_TILES = {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)}


def _tile(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tile:
    tiles = FP32_TILES if dtype.itemsize > 2 else TILES.get(architecture(device), SAFE_TILES)
    return tiles[max(64, next_power_of_2(head_dim))]


def query_block(head_dim: int, device: torch.device, dtype: torch.dtype) -> int:
    """Queries of one tile (BLOCK_M) on this device: the `block` that `prefill_tiles` needs."""
    return _tile(head_dim, device, dtype).block_m


def prefill_tiles(query_lens: npt.ArrayLike, kv_lens: npt.ArrayLike, block: int) -> npt.NDArray[np.int32]:
    """All (sequence, query block) tiles of a step, those with the most keys first, below a row with their number
    # [1 + num_tiles, 2] int32.

    query_lens, kv_lens  # [S] new tokens, and cached + new tokens, of each sequence. block: from `query_block`.
    """
    new = np.asarray(query_lens, dtype=np.int64)
    cached = np.asarray(kv_lens, dtype=np.int64) - new
    num_blocks = -(-new // block)
    sequence = np.repeat(np.arange(len(new)), num_blocks)
    first_tile = np.cumsum(num_blocks) - num_blocks
    query_block = np.arange(len(sequence)) - first_tile[sequence]
    num_keys = cached[sequence] + np.minimum((query_block + 1) * block, new[sequence])
    heaviest_first = np.argsort(-num_keys, kind="stable")
    tiles = np.stack([sequence, query_block], axis=1)[heaviest_first]
    return np.concatenate([[[len(tiles), 0]], tiles]).astype(np.int32)


# The index tensors are slices of one upload: their alignment changes from step to step and must not recompile.
@triton.jit(
    do_not_specialize=["page_table_ptr", "rows_ptr", "cu_seqlens_ptr", "kv_lens_ptr", "tiles_ptr", "page_table_stride"]
)
def _attention_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    kv_head = head // (HEADS // KV_HEADS)
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM

    queries = block_start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens = (first_token + queries).to(tl.int64)
    q_mask = (queries < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + head * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)

    cached = kv_len - query_len
    places = cached + queries
    first_place = cached + block_start
    end = tl.minimum(first_place + BLOCK_M, kv_len)
    first_key = 0
    full_begin = 0  # from here to full_end every query of the tile sees all keys
    full_end = (first_place + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        first_key = tl.maximum(first_place + 1 - WINDOW, 0)
        full_begin = tl.maximum(end - WINDOW, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    SLOT_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    begin = first_key // BLOCK_N * BLOCK_N
    # The page id is loaded one block ahead: waiting for it before each key load costs a quarter of the speed
    # (327 against 427 TFLOP/s on an H200).
    next_page = load_page_ids(table_row, begin, end, PAGE_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        page = next_page
        next_page = load_page_ids(table_row, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        # Keys past the end are there, whatever they are, and get no score; values would count even so: 0 * NaN.
        k = load_block(
            k_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, WINDOW > 0
        )
        v = load_block(v_ptr, page, start, first_key, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if (start < full_begin) | (start >= full_end):
            keys = start + tl.arange(0, BLOCK_N)
            visible = keys[None, :] <= places[:, None]
            if WINDOW > 0:
                visible &= keys[None, :] > places[:, None] - WINDOW
            scores = tl.where(visible, scores, MASKED_SCORE)
        acc, row_max, row_sum = online_softmax(scores, v, acc, row_max, row_sum, scale_log2)

    row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # rows past the sequence's end may have seen nothing
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :], out, mask=q_mask)


def attention_prefill(
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
    """Write the attention of packed queries over their sequences' pages into `out`.

    q  # [T, H, D], tokens any stride apart; k_cache, v_cache  # [P, page_size, K, D], one layer, contiguous.
    page_table  # [R, M]; rows  # [S] page_table row of each sequence; cu_seqlens  # [S + 1] offsets of its tokens in q,
    ascending; kv_lens  # [S] cached + new tokens; all int32. tiles  # [1 + num_tiles, 2] int32, from
    `prefill_tiles(..., query_block(D, device, dtype))`: no other block fits; rows behind its own are not read. window:
    keys a token sees, its own included; 0 is all. out  # [T, H, D] contiguous; tokens outside cu_seqlens are not
    written.
    Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, window, out)
    check_index("cu_seqlens", cu_seqlens, q.device, (rows.shape[0] + 1,))
    check_index("tiles", tiles, q.device, (None, 2))
    if not use_triton(q):
        index = page_table, rows, cu_seqlens, kv_lens
        result = attention_prefill_reference(q, k_cache, v_cache, *index, scale=scale, window=window)
        write_chunks(out, result, cu_seqlens)
        return
    if tiles.shape[0] == 1:
        return

    arguments = (q, k_cache, v_cache, page_table, rows, cu_seqlens, kv_lens, tiles)
    hopper = hopper_module("attention_prefill_sm90", q.device)
    if hopper is not None and hopper.fits(q, k_cache, v_cache, window):
        hopper.attention_prefill_sm90(*arguments, scale=scale, out=out)
    else:
        attention_prefill_portable(*arguments, scale=scale, window=window, out=out)


def attention_prefill_portable(
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
    """Launch the kernel of this file, for arguments that `attention_prefill` has checked and at least one tile."""
    _, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    tile = _tile(head_dim, q.device, q.dtype)
    _attention_prefill_kernel[((tiles.shape[0] - 1) * heads,)](
        q,
        k_cache,
        v_cache,
        page_table,
        rows,
        cu_seqlens,
        kv_lens,
        tiles,
        out,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=window,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"maxnreg": tile.max_registers} if tile.max_registers else {}),
    )
