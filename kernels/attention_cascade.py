"""Decode attention over a prefix that several sequences share: its keys and values are read once for many of them.

    partial[b, s, h]    = sum_j softmax_j(scale * q[b, h] . k[j]) v[j]     over the keys j of split s,
    logsumexp[b, s, h]  = log2 sum_j exp(scale * q[b, h] . k[j])           for s < shared_splits[b]

Legend: B sequences, H query heads, K KV heads, D head dim, P pages, R rows, M pages of a row, S splits of the
workspace, N tiles, C members of a tile.
Bound by memory: 4 K D bytes a key in bf16, once for each tile; its members alone would read them once each.

`attention_decode` cuts the keys of a sequence into splits whose size follows from its own length. Sequences whose page
tables start with the same pages, and whose splits have the same size, have the same first splits. A *tile* is up to C
of them: one program computes one of these splits, for one KV head, for all members, and puts the results where
`attention_decode` would have put them before it combines the splits. Tiles say who computes a split, never what is
computed: a result has the same bits with and without them. The order of every sum follows from a matmul's shape
through the compiler's choice of instruction and layout, so a program works in blocks of the shape that
`attention_decode` has: BLOCK_G rows, which are there the query heads of one sequence and padding, and here those of
BLOCK_G // (H // K) sequences. A few blocks use the same keys and values.
Source of the idea: Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.decode_splits import decode_tile, split_size, splits_of
from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import check, check_same, next_power_of_2, use_triton
from minisgl.kernels.paged import LOG2_E, check_attention, check_index, load_block, load_page_ids, online_softmax


class CascadeTiles(NamedTuple):
    """Which sequences compute their first splits together; int32. No sequence is in two tiles. The members of a tile
    have the same split size, and the same pages in their first `tile_splits` splits, which are not all of any."""

    shared_splits: torch.Tensor  # [B] the splits that a tile computes for the sequence; 0: it is in none
    tile_splits: torch.Tensor  # [N] the splits that a tile computes; 0: an unused tile
    members: torch.Tensor  # [N, C] sequences, at least one in a used tile; then -1

    @classmethod
    def unpack(cls, packed: torch.Tensor, batch: int, tile_members: int) -> "CascadeTiles":
        """Views of shared_splits, tile_splits and members, end to end in `packed`, of the `max_tiles` of a batch."""
        num_tiles = max_tiles(batch, tile_members)
        shared_splits, tile_splits, members = packed.split([batch, num_tiles, num_tiles * tile_members])
        return cls(shared_splits, tile_splits, members.view(num_tiles, tile_members))


def min_members(tile_members: int) -> int:
    """Fewer sequences than this make no tile: it would use less than half of its matmul rows."""
    return max(tile_members // 2, 2)


def max_tiles(batch: int, tile_members: int) -> int:
    """The most tiles, of at least `min_members` each, that a batch can have: N of a captured graph."""
    return batch // min_members(tile_members)


def tile_members(heads: int, kv_heads: int, dtype: torch.dtype) -> int:
    """C that suits a model; 1: no two sequences fit in a tile."""
    # Blocks on the same keys: at D=128 on sm_90, 2 take 168 of 255 registers, 3 take 236 and 4 spill; in fp32, 2 spill.
    blocks = 2 if dtype.itemsize == 2 else 1
    return blocks * _block_members(heads, kv_heads)


def _block_rows(heads: int, kv_heads: int) -> int:
    return max(16, next_power_of_2(heads // kv_heads))  # as in `attention_decode`


def _block_members(heads: int, kv_heads: int) -> int:
    return _block_rows(heads, kv_heads) // (heads // kv_heads)


def attention_cascade_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    tiles: CascadeTiles,
    partial: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    scale: float,
) -> None:
    """The same in torch, member by member; shapes as in `attention_cascade`, computed in the type of `partial`."""
    _, page_size, kv_heads, head_dim = k_cache.shape
    for splits, members in zip(tiles.tile_splits.tolist(), tiles.members.tolist(), strict=True):
        for member in members if splits else ():
            if member < 0:
                continue
            size = split_size(int(kv_lens[member]))
            pages = page_table[rows[member], : splits * size // page_size].long()
            k, v = (
                cache[pages].view(splits, size, kv_heads, head_dim).to(partial.dtype) for cache in (k_cache, v_cache)
            )
            queries = q[member].to(partial.dtype).view(kv_heads, -1, head_dim)  # [K, G, D]
            scores = torch.einsum("kgd,sjkd->skgj", queries, k) * scale
            partial[member, :splits] = torch.einsum("skgj,sjkd->skgd", scores.softmax(-1), v).flatten(1, 2)
            logsumexp[member, :splits] = scores.logsumexp(-1).flatten(1, 2) * LOG2_E


@triton.jit(
    do_not_specialize=[
        "page_table_ptr",
        "rows_ptr",
        "kv_lens_ptr",
        "tile_splits_ptr",
        "members_ptr",
        "page_table_stride",
        "max_splits",
    ],
)
def _attention_cascade_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    rows_ptr,
    kv_lens_ptr,
    tile_splits_ptr,
    members_ptr,
    partial_ptr,
    logsumexp_ptr,
    scale_log2,
    q_stride,
    page_table_stride,
    max_splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS
    tile = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCK_MEMBERS: tl.constexpr = BLOCK_G // GROUP
    SLOT_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    members_ptr += tile * (BLOCKS * BLOCK_MEMBERS)
    # The kernel before this one wrote q, but neither tiles, lengths nor pages: see dependent_launch.py.
    is_shared = split < tl.load(tile_splits_ptr + tile)
    first_member = tl.load(members_ptr, mask=is_shared, other=0)
    _, _, size, _ = splits_of(tl.load(kv_lens_ptr + first_member), 0, BLOCK_N)
    begin = split * size
    end = begin + size
    row = tl.load(rows_ptr + first_member, mask=is_shared, other=0)
    table_row = page_table_ptr + row.to(tl.int64) * page_table_stride
    next_page = load_page_ids(table_row, begin, tl.where(is_shared, end, 0), PAGE_SIZE, BLOCK_N)
    wait_for_previous_kernel(PDL)
    if not is_shared:
        return
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM

    pairs = tl.arange(0, BLOCK_G)  # (member, query head) of a block
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + pairs % GROUP
    members: tl.tuple = ()  # of each block: [BLOCK_G] sequences, of which a row is a query head; -1 is padding
    queries: tl.tuple = ()  # [BLOCK_G, BLOCK_D]
    states: tl.tuple = ()  # accumulated values  # [BLOCK_G, BLOCK_D], running maximum and sum  # [BLOCK_G]
    for block in tl.static_range(BLOCKS):
        in_block = pairs < BLOCK_MEMBERS * GROUP
        member = tl.load(members_ptr + block * BLOCK_MEMBERS + pairs // GROUP, mask=in_block, other=-1).to(tl.int64)
        mask = (member >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
        q_heads = q_ptr + member * q_stride + heads * HEAD_DIM
        q = tl.load(q_heads[:, None] + dims[None, :], mask=mask, other=0.0)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
        members += (member,)
        queries += (q,)
        states += ((acc, row_max, tl.zeros([BLOCK_G], tl.float32)),)

    for start in range(begin, end, BLOCK_N):
        page = next_page
        next_page = load_page_ids(table_row, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        k = load_block(k_ptr, page, start, 0, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        v = load_block(v_ptr, page, start, 0, end, SLOT_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        new_states: tl.tuple = ()
        for block in tl.static_range(BLOCKS):
            scores = tl.dot(queries[block], tl.trans(k), input_precision="ieee")
            acc, row_max, row_sum = states[block]
            new_states += (online_softmax(scores, v, acc, row_max, row_sum, scale_log2),)
        states = new_states

    for block in tl.static_range(BLOCKS):
        acc, row_max, row_sum = states[block]
        stored = members[block] >= 0
        slots = (members[block] * max_splits + split) * HEADS + heads
        mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc / row_sum[:, None], mask=mask)
        tl.store(logsumexp_ptr + slots, row_max + tl.log2(row_sum), mask=stored)


def attention_cascade(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    tiles: CascadeTiles,
    partial: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Fill the workspace of `attention_decode` for the splits that `tiles` share; nothing else of it is written.

    q, k_cache, v_cache, page_table, rows, kv_lens and scale as in `attention_decode`. partial  # [B, S, H, D] fp32,
    logsumexp  # [B, S, H] fp32, contiguous. Nothing here looks at what the host has put in `tiles`: they must be what
    `CascadeTiles` says. Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check_attention(q, k_cache, v_cache, page_table, rows, kv_lens, scale, 0, None)
    batch, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    check(rows.shape[0] == batch, f"rows: expected [{batch}], got {list(rows.shape)}")
    check_index("shared_splits", tiles.shared_splits, q.device, (batch,))
    check_index("members", tiles.members, q.device, (None, None))
    num_tiles, tile_size = tiles.members.shape
    check_index("tile_splits", tiles.tile_splits, q.device, (num_tiles,))
    block_members = _block_members(heads, kv_heads)
    check(tile_size % block_members == 0, f"members: {tile_size} a tile are not a multiple of {block_members}")
    check(partial.dim() == 4, f"partial: expected [B, S, H, D], got {list(partial.shape)}")
    max_splits = partial.shape[1]
    for name, x, tail in (("partial", partial, (heads, head_dim)), ("logsumexp", logsumexp, (heads,))):
        check_same(name, x, device=q.device, dtype=torch.float32)
        shape = (batch, max_splits, *tail)
        check(x.shape == shape, f"{name}: expected {list(shape)}, got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous, got strides {x.stride()}")
    if num_tiles == 0 or max_splits == 1:
        return
    if not use_triton(q):
        attention_cascade_reference(
            q, k_cache, v_cache, page_table, rows, kv_lens, tiles, partial, logsumexp, scale=scale
        )
        return
    tile = decode_tile(head_dim, q.device, q.dtype)
    _attention_cascade_kernel[((max_splits - 1) * kv_heads, num_tiles)](  # a sequence's last split is never shared
        q,
        k_cache,
        v_cache,
        page_table,
        rows,
        kv_lens,
        tiles.tile_splits,
        tiles.members,
        partial,
        logsumexp,
        scale * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        max_splits,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCKS=tile_size // block_members,
        BLOCK_G=_block_rows(heads, kv_heads),
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(q.device),
    )
