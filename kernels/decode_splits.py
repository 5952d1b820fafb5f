"""How decode attention cuts a sequence's keys into splits, and a split into blocks; what its two kernels share.

A split's place and size follow from the sequence's own visible keys, never from the batch or the grid, so a sequence's
result does not depend on what runs beside it, nor on which kernel computes a split.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import architecture, next_power_of_2

# Keys of a split: short contexts need more programs than one a KV head to fill a GPU (1 x 1024 on an H200: 8.3 us with
# splits of 256, 17.6 with 1024); long ones pay for every extra split (1 x 32768: 2.2 against 3.4 TB/s).
SHORT_CONTEXT = tl.constexpr(2048)
SHORT_SPLIT = tl.constexpr(256)
LONG_SPLIT = tl.constexpr(1024)


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


@triton.jit
def splits_of(kv_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first visible key, first key read, keys of a split, number of splits) of a sequence."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(kv_len - WINDOW, 0)
    begin = first_key // BLOCK_N * BLOCK_N
    split_size = tl.where(kv_len - begin <= SHORT_CONTEXT, SHORT_SPLIT, LONG_SPLIT)
    return first_key, begin, split_size, (kv_len - begin + split_size - 1) // split_size


def max_splits_of(max_kv_len: int, window: int, block_n: int) -> int:
    """The most splits that `splits_of` gives a sequence of up to max_kv_len keys; at least 1."""
    visible = min(max_kv_len, window + block_n - 1) if window else max_kv_len
    short: int = -(-min(visible, SHORT_CONTEXT.value) // SHORT_SPLIT.value)
    long: int = -(-visible // LONG_SPLIT.value)
    return max(short, long, 1)
