"""How decode attention cuts a sequence's keys into splits, and a split into blocks, and how splits become one result:
what its kernels share.

A split's place and size follow from the sequence's own visible keys, never from the batch or the grid, and a result is
the merge of its splits in their order, so it does not depend on what runs beside a sequence, nor on which kernel
computes a split.

Few sequences have a program for each split. Of many, a short context has one for all of its splits, which merges them
in registers and leaves nothing for others to add up. The bits are the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture, next_power_of_2

# Keys of a split, by the keys that a sequence sees. Up to eight splits of short contexts: a batch of few needs more
# programs than one a KV head to fill a GPU, and a program takes about a microsecond a block. Long contexts pay for
# every extra split (1 x 32768 on an H200: 2.2 TB/s with splits of 256, 3.4 with 1024).
LEAST_SPLIT = tl.constexpr(64)
SHORT_SPLITS = tl.constexpr(8)
SHORT_CONTEXT = tl.constexpr(4 * 64 * 8)
LONG_SPLIT = tl.constexpr(1024)

# Parts asked for together, heads of a program, and its warps: many small programs at once hide their chain of loads
# (256 x 560 takes 0.1 ms a step more with 4 warps). The interpreter runs programs one after another.
COMBINE = {"BLOCK_S": 8, "BLOCK_H": 2, "num_warps": 1}
COMBINE_INTERPRETED = {"BLOCK_S": 2, "BLOCK_H": 16, "num_warps": 1}


class Tile(NamedTuple):
    """Keys of a block, warps and pipeline stages."""

    block_n: int
    num_warps: int
    num_stages: int


# By architecture and head dim, rounded up to 64, 128 or 256; for 2-byte types.
TILES: dict[str, dict[int, Tile]] = {
    "sm_90": {64: Tile(64, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 3)},
    "sm_80": {64: Tile(64, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 3)},
    "sm_100": {64: Tile(64, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 3)},
    "sm_120": {64: Tile(64, 4, 3), 128: Tile(32, 4, 3), 256: Tile(32, 4, 2)},
    "gfx942": {64: Tile(64, 4, 2), 128: Tile(32, 4, 2), 256: Tile(32, 4, 2)},
    "cpu": {64: Tile(32, 4, 1), 128: Tile(32, 4, 1), 256: Tile(32, 4, 1)},
}
SAFE_TILES = TILES["gfx942"]  # an architecture without a table: the smallest shared memory of all, 64 KB, holds them
# Exact fp32 has no tensor cores, and its blocks are twice as large: one small table fits everywhere.
FP32_TILES = {64: Tile(32, 4, 2), 128: Tile(32, 4, 1), 256: Tile(16, 4, 1)}


def decode_tile(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for a head dim."""
    tiles = FP32_TILES if dtype.itemsize > 2 else TILES.get(architecture(device), SAFE_TILES)
    return tiles[max(64, next_power_of_2(head_dim))]


def combine_block(device: torch.device) -> dict[str, int]:
    """The block sizes of `combine_parts`, and its warps."""
    return COMBINE_INTERPRETED if architecture(device) == "cpu" else COMBINE


@triton.jit
def splits_of(kv_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first visible key, first key read, keys of a split, number of splits) of a sequence."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(kv_len - WINDOW, 0)
    begin = first_key // BLOCK_N * BLOCK_N
    visible = kv_len - begin
    split_size = tl.where(
        visible <= SHORT_CONTEXT // 2, SHORT_CONTEXT // 2 // SHORT_SPLITS, SHORT_CONTEXT // SHORT_SPLITS
    )
    split_size = tl.where(visible <= LEAST_SPLIT * SHORT_SPLITS, LEAST_SPLIT, split_size)
    split_size = tl.where(visible <= SHORT_CONTEXT, split_size, LONG_SPLIT)
    return first_key, begin, split_size, (visible + split_size - 1) // split_size


@triton.jit
def parts_of(kv_len, begin, split_size):
    """(keys of a part, number of parts) of one of many sequences, from what `splits_of` says of it: a program reads a
    part, which is a short context or a split of a long one."""
    size = tl.where(split_size == LONG_SPLIT, LONG_SPLIT, SHORT_CONTEXT)
    return size, (kv_len - begin + size - 1) // size


SPLIT_BORDERS = tuple(SHORT_CONTEXT.value // part for part in (4, 2, 1))  # visible keys above which splits are longer


def split_size(visible: int) -> int:
    """Keys of a split of a sequence that sees so many keys, from the first that is read: the same on the host."""
    if visible > SHORT_CONTEXT.value:
        return int(LONG_SPLIT.value)
    return int(max(LEAST_SPLIT.value, next_power_of_2(max(visible, 1)) // SHORT_SPLITS.value))


def max_parts_of(max_kv_len: int, window: int, block_n: int, many: bool) -> int:
    """The most splits, or parts as one of many has, of a sequence of up to max_kv_len keys; at least 1."""
    visible = min(max_kv_len, window + block_n - 1) if window else max_kv_len
    short: int = 1 if many else min(-(-visible // LEAST_SPLIT.value), SHORT_SPLITS.value)
    long: int = -(-visible // LONG_SPLIT.value) if visible > SHORT_CONTEXT.value else 1
    return max(short, long, 1)


@triton.jit
def merge_split(acc, running_max, total, partial, logsumexp):
    """Add a split  # [rows, D], [rows] to the sum of those before it  # [rows, D], [rows], [rows]; all fp32. Each step
    is one rounding, named here, so that every kernel that merges splits in their order makes the same bits."""
    new_max = tl.maximum(running_max, logsumexp)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # no split had a key yet: -inf - -inf is NaN
    rescale = tl.exp2(running_max - shift)
    weight = tl.exp2(logsumexp - shift)
    acc = tl.fma(partial, tl.broadcast_to(weight[:, None], acc.shape), acc * rescale[:, None])
    return acc, new_max, tl.fma(total, rescale, weight)


@triton.jit
def finish_merge(acc, running_max, total):
    """What `merge_split` has added up as one (partial, logsumexp); zeros and -inf where no split had a key."""
    return acc / tl.where(total > 0, total, 1.0)[:, None], running_max + tl.log2(total)


@triton.jit
def combine_parts(
    partial_ptr,
    logsumexp_ptr,
    out_ptr,
    sequence,
    first_head,
    end_head,
    num_parts,
    max_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,  # parts that are asked for together
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a sequence's output for the heads first_head..end_head, up to BLOCK_H, from the workspaces partial
    # [B, max_parts, H, D] and logsumexp  # [B, max_parts, H]."""
    heads = first_head + tl.arange(0, BLOCK_H)
    is_head = heads < end_head
    dims = tl.arange(0, BLOCK_D)
    mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    running_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, num_parts, BLOCK_S):
        sums = ()
        partials = ()
        for place in tl.static_range(BLOCK_S):
            part = start + place + heads * 0
            slots = (sequence * max_parts + part) * HEADS + heads
            stored = is_head & (part < num_parts)
            values = partial_ptr + slots[:, None] * HEAD_DIM + dims[None, :]
            sums += (tl.load(logsumexp_ptr + slots, mask=stored, other=float("-inf")),)  # type: ignore[assignment]
            partials += (tl.load(values, mask=stored[:, None] & mask, other=0.0),)  # type: ignore[assignment]
        for place in tl.static_range(BLOCK_S):  # one after another; past the last, nothing is added
            acc, running_max, total = merge_split(acc, running_max, total, partials[place], sums[place])
    out = out_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    y, _ = finish_merge(acc, running_max, total)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
