"""Which decoding requests attend to a shared prefix together: the tiles of `kernels.attention_cascade`, and whether
they are worth a launch.

A page of the prefix tree stands at one place of one path. So two requests that have the same tree page have the same
pages before it, and the page at the end of a split names all the keys up to there: grouping compares one number a
request and split, never tokens.

Knows requests and their pages. Knows no tensors, and nothing of the tree but that its pages come first in a request.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisgl.kernels.attention_cascade import max_tiles, min_members
from minisgl.kernels.decode_splits import SPLIT_BORDERS, split_size
from minisgl.request import Request

Ints = npt.NDArray[np.int32]

# What a GPU reads from its memory while one program works through one key of a split. The added launch lasts about as
# long as one of its programs, so this times a split's keys is what tiles must save in each layer. Measured on an H200,
# which reads 4.2 TB/s: 8 us for splits of 256 keys, 24 us for 1,024 (32 rows, 32 / 8 heads of 128).
BREAK_EVEN_BYTES_PER_KEY = 128 << 10


def packed_length(batch: int, tile_members: int) -> int:
    return batch + max_tiles(batch, tile_members) * (1 + tile_members)


@dataclass(frozen=True, eq=False)
class CascadePlan:
    """The tiles of a step; sequences are places in its `decodes`. See `CascadeTiles`."""

    shared_splits: Ints  # [B]
    tile_splits: Ints  # [N]
    members: Ints  # [N, C]; -1 after a tile's last

    @property
    def tile_members(self) -> int:
        return int(self.members.shape[1])

    def packed(self, batch: int) -> Ints:
        """What `CascadeTiles.unpack` takes, for a batch padded to `batch` sequences; always of the same length."""
        num_tiles = max_tiles(batch, self.tile_members)
        packed = np.zeros(packed_length(batch, self.tile_members), np.int32)
        packed[: len(self.shared_splits)] = self.shared_splits
        packed[batch : batch + len(self.tile_splits)] = self.tile_splits
        packed[batch + num_tiles :][: self.members.size] = self.members.ravel()
        return packed


class CascadePlanner:
    """Plans steps one after another, and remembers the last: while the same requests decode, and none grows into
    longer splits, its plan stays.

    tile_members: C of the tiles; page_size: tokens of a page; kv_bytes: of the keys and values of a token in a layer.
    """

    def __init__(self, tile_members: int, page_size: int, kv_bytes: int) -> None:
        self.tile_members = tile_members
        self.page_size = page_size
        self.kv_bytes = kv_bytes
        self._pages: list[list[int]] = []
        self._size_classes: Ints = np.empty(0, np.int32)
        self._plan: CascadePlan | None = None
        self.num_plans = 0  # made so far, of those that pay

    def plan(self, decodes: Sequence[Request]) -> CascadePlan | None:
        """The tiles of these requests, or None when they would not pay; the very same object while nothing changed."""
        # The lists themselves are compared, mostly by identity: a request that was preempted comes back with a new one.
        pages = [request.pages for request in decodes]
        lengths = np.fromiter((request.length for request in decodes), np.int32, len(decodes))
        size_classes = np.searchsorted(SPLIT_BORDERS, lengths).astype(np.int32)
        if pages != self._pages or not np.array_equal(size_classes, self._size_classes):
            self._pages, self._size_classes = pages, size_classes
            self._plan = self._make_plan(decodes)
        return self._plan

    def _make_plan(self, decodes: Sequence[Request]) -> CascadePlan | None:
        ends = [self._split_ends(request) for request in decodes]
        tiles = _make_tiles(ends, self.tile_members)
        sizes = [split_size(decodes[tile[0]].length) for _, tile in tiles]
        saved_keys = sum((len(tile) - 1) * splits * size for (splits, tile), size in zip(tiles, sizes, strict=True))
        if saved_keys * self.kv_bytes <= max(sizes, default=0) * BREAK_EVEN_BYTES_PER_KEY:
            return None
        members = np.full((len(tiles), self.tile_members), -1, np.int32)
        shared_splits = np.zeros(len(decodes), np.int32)
        for row, (splits, tile) in zip(members, tiles, strict=True):
            row[: len(tile)] = tile
            shared_splits[tile] = splits
        self.num_plans += 1
        return CascadePlan(shared_splits, np.array([splits for splits, _ in tiles], np.int32), members)

    def _split_ends(self, request: Request) -> list[int]:
        """The last page of each split that lies in the prefix tree, but for the request's last split."""
        size = split_size(request.length)
        if size < self.page_size:  # a page of several splits: too short a context to be worth it
            return []
        splits = min(request.num_shared * self.page_size, request.length - 1) // size
        pages_per_split = size // self.page_size
        return request.pages[pages_per_split - 1 : splits * pages_per_split : pages_per_split]


def _make_tiles(ends: Sequence[Sequence[int]], tile_members: int) -> list[tuple[int, list[int]]]:
    """(splits, members) of each tile. ends[i] names the prefixes of sequence i, one for each number of splits.

    A sequence goes where it shares most: those that share a prefix and are too few or too many for whole tiles join
    others at a shorter one.
    """
    fewest = min_members(tile_members)
    levels: list[list[list[int]]] = []  # the groups that share one split, two, ...
    candidates = list(range(len(ends)))
    while candidates:
        groups = defaultdict(list)
        splits = len(levels)
        for sequence in candidates:
            if splits < len(ends[sequence]):
                groups[ends[sequence][splits]].append(sequence)
        levels.append([group for group in groups.values() if len(group) >= fewest])
        candidates = [sequence for group in levels[-1] for sequence in group]
    tiles: list[tuple[int, list[int]]] = []
    placed = [False] * len(ends)
    for splits in range(len(levels), 0, -1):
        for group in levels[splits - 1]:
            free = [sequence for sequence in group if not placed[sequence]]
            num_tiles = min(-(-len(free) // tile_members), len(free) // fewest)
            free = free[: num_tiles * tile_members]
            for first in range(num_tiles):
                tiles.append((splits, free[first::num_tiles]))
            for sequence in free:
                placed[sequence] = True
    return tiles
