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
merges. They have a file each. Both do a split and merge it by the functions of this file, in blocks of the same shape,
so the order of every sum is the same:
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

from minisgl.kernels.launch import architecture, next_power_of_2
from minisgl.kernels.paged import MASKED_SCORE, load_block, load_page_ids

# Keys of a split: whole blocks of every tile. Smaller is faster for few short sequences, larger for few long ones.
SPLIT = 512

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


def tile_of(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tile:
    tiles = FP32_TILES if dtype.itemsize > 2 else TILES.get(architecture(device), SAFE_TILES)
    return tiles[max(64, next_power_of_2(head_dim))]


def query_block(head_dim: int, device: torch.device, dtype: torch.dtype) -> int:
    """Queries of a tile of `invariant_prefill`: the `block` that `prefill_tiles` needs."""
    return tile_of(head_dim, device, dtype).block_m


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
def attend_split(
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
def merge(acc, row_max, row_sum, split_acc, split_max, split_sum):
    """Add a split to those before it. A row without keys in the split stays as it is."""
    new_max = tl.maximum(row_max, split_max)
    shift = _shift(new_max)
    kept = tl.exp2(row_max - shift)
    added = tl.exp2(split_max - shift)
    acc = tl.fma(split_acc, added[:, None], acc * kept[:, None])
    return acc, new_max, tl.fma(split_sum, added, row_sum * kept)


@triton.jit
def mean(acc, row_sum):
    """The output of rows; of a row without keys 0."""
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]


def descriptors(k_cache: torch.Tensor, v_cache: torch.Tensor, tile: Tile) -> tuple[TensorDescriptor | None, ...]:
    """Those of keys and values as [slots, K * D] in blocks of one head; None each where TMA does not take them."""
    _, page_size, _, head_dim = k_cache.shape
    aligned = k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0
    if not (tile.tma and aligned and page_size >= tile.block_n and head_dim == block_d(head_dim)):
        return None, None
    return tuple(
        TensorDescriptor.from_tensor(cache.flatten(2).flatten(0, 1), [tile.block_n, head_dim])
        for cache in (k_cache, v_cache)
    )


def block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def launch_options(q: torch.Tensor, k_cache: torch.Tensor, window: int, tile: Tile, tma: bool) -> dict[str, int | bool]:
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
        "BLOCK_D": block_d(head_dim),
        "TMA": tma,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **FUSION,
    }
