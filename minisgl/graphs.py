"""Captured steps: prepare, model, LM head, sampling and write-back as one CUDA graph, replayed with new inputs.

A graph is made when its size is first needed (tens of milliseconds; kernels are compiled by then), so that start-up
captures nothing that is never used. There are two kinds.

- Decodes alone. The inputs are `rows` and, where some share a prefix, tiles of them: everything else is in the row
  table. A batch smaller than the graph is padded with row -1, which no kernel acts on.
- Chunks of prompts, with decodes or without: the inputs are what `rows.pack` makes of the step in a room of fixed
  size. Such steps launch hundreds of kernels, which takes the host longer than the device up to some thousand tokens.

A batch runs as one. In two halves on two streams, so that matmuls of one might run beside attention of the other, a
step of Qwen3-0.6B took 1 to 7% longer on an H200 (64 to 256 rows), also with priorities, and with tiles of attention
and of matmuls that leave room for each other.

Ranks make the same graphs, or none of them does. All graphs share one memory pool, since they run one after another and
what a step made is copied out before the next replay.

Knows steps and the row table. Does not know models.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from minisgl.batch import Batch
from minisgl.cascade import CascadePlan, packed_length
from minisgl.forward import Forward, Wanted
from minisgl.kernels.attention_cascade import CascadeTiles
from minisgl.kernels.attention_decode import FEW_KEYS
from minisgl.parallel import ParallelGroup
from minisgl.rows import Room, RowTable, pack
from minisgl.scheduler import Step
from minisgl.upload import ints

log = logging.getLogger("minisgl")

# Decode time grows slowly with the batch, so padding up to the next size costs little.
BATCH_SIZES = (1, 2, 4, 8, 12, 16, *range(32, 256, 32), *range(256, 512, 64), *range(512, 4097, 128))
# Where Hopper's matmuls take over at 32 rows, these lose to padding: as one of 32, a step with 16 rows takes 5 to 13%
# less with Qwen3-0.6B and 2 to 4% less with 8B, with 12 rows 9% less to 2% more and 1 to 2% less. With 8 it takes 5%
# less to 7% more, and up to 2% more. (One H200, contexts of 100 to 1,700 tokens.)
LOSING_ON_HOPPER = 12, 16
# The grid of attention is made for contexts up to the bound: too large a bound launches many programs that leave at
# once.
CONTEXT_BOUNDS = (2048, 4096, 8192, 16384, 32768, 131072, 1 << 30)

# A step with chunks is padded to so many tokens, which cost as much as others do. One with more runs eagerly: there the
# device takes longer than the host.
TOKENS = (32, 64, *range(128, 1024, 128), *range(1024, 2049, 256))
# It samples for a number of rows that few graphs cover, and has room for so many chunks.
SAMPLES = (8, 32, *range(64, 256, 64), *range(256, 4097, 256))
CHUNKS = 64


def padded_size(batch: int, sizes: Sequence[int]) -> int:
    """The size of the graph that holds a batch."""
    return sizes[bisect_left(sizes, batch)] if batch <= sizes[-1] else batch


def _below(sizes: Sequence[int], size: int) -> int:
    """The largest of ascending sizes that is smaller; 0 if none is."""
    place = bisect_left(sizes, size)
    return sizes[place - 1] if place else 0


class Key(NamedTuple):
    """What a graph is made for."""

    size: int  # of the batch, padding included: rows that decode and, with chunks, rows that are sampled
    bound: int  # on the rows' lengths
    tile_members: int  # of the tiles of a shared prefix; 0: no row shares one
    wanted: Wanted
    masked: bool  # ends with logits, which are sampled once the masks are there
    tokens: int = 0  # of a step with chunks, padding included; 0: decodes alone


class Captured(NamedTuple):
    """A graph, what it makes, and the int32 inputs that it reads beside the tiles of a shared prefix."""

    graph: torch.cuda.CUDAGraph
    made: Forward
    inputs: torch.Tensor


class StepGraphs:
    """Steps of up to `max_batch` decodes, padded to one of the `sizes`, ascending, and beside them chunks of some
    tokens; `forward` runs a batch as a key says. Of `short_sizes` there are graphs for contexts of up to FEW_KEYS
    tokens too."""

    def __init__(
        self,
        rows: RowTable,
        forward: Callable[[Batch, Key], Forward],
        max_batch: int,
        group: ParallelGroup,
        sizes: Sequence[int],
        short_sizes: Container[int],
    ) -> None:
        self.rows = rows
        self._sizes = sizes
        self._short_sizes = short_sizes
        self.max_batch = max_batch
        # Several ranks exchange sums of so many tokens through NCCL, which no graph has captured yet.
        self.max_tokens = TOKENS[-1] if group.size == 1 else 0
        self._forward = forward
        self._group = group
        self._max_rows, self._max_len = rows.tokens.shape
        # The inputs of decodes alone and of tiles, of which each graph reads the start; and what they start with now.
        self._rows_in = torch.full((BATCH_SIZES[-1],), -1, dtype=torch.int32, device=rows.device)
        self._cascade_in = torch.zeros(4 * BATCH_SIZES[-1], dtype=torch.int32, device=rows.device)
        self._loaded_rows: list[int | None]
        self._loaded_cascade: tuple[int, CascadePlan | None]
        self._forget_inputs()
        self._graphs: dict[Key, Captured] = {}
        self._seen_once: set[Key] = set()
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def keys(self) -> list[Key]:
        """What graphs were made for, in their order."""
        return list(self._graphs)

    def run(self, step: Step, wanted: Wanted, masked: bool) -> Forward | None:
        """Replay a step; what it made is valid until the next replay. None if no graph can hold it."""
        key = self._key(step, wanted, masked)
        if key is None or (key not in self._graphs and not self._capture(key)):
            return None
        captured = self._graphs[key]
        changed = []
        rows, cascade = self._loaded_rows, self._loaded_cascade
        if key.tokens:
            packed = pack(step, self.rows.query_block, self._room(key))
            changed.append((captured.inputs, np.concatenate(list(packed.values()))))
        else:
            rows = [request.row for request in step.decodes] + [-1] * (key.size - len(step.decodes))
            if rows != self._loaded_rows:
                changed.append((captured.inputs, ints(rows)))
        if step.cascade and (key.size, step.cascade) != cascade:
            cascade = key.size, step.cascade
            tiles = step.cascade.packed(key.size)
            changed.append((self._cascade_in[: len(tiles)], tiles))
        self._forget_inputs()  # what a transfer that fails leaves there is not known
        self.rows.update(step, changed)
        self._loaded_rows, self._loaded_cascade = rows, cascade
        captured.graph.replay()
        return captured.made.first(len(step.sampled))

    def _key(self, step: Step, wanted: Wanted, masked: bool) -> Key | None:
        """Of the graph that holds a step; None if none does."""
        batch, tokens, sampled = len(step.decodes), 0, step.sampled
        if batch > self.max_batch:
            return None
        size = padded_size(batch, self._sizes)
        if step.chunks:
            keeps = any(chunk.pools or chunk.scores for chunk in step.chunks)
            if keeps or step.num_tokens > self.max_tokens or len(sampled) > SAMPLES[-1] or len(step.chunks) > CHUNKS:
                return None
            tokens = TOKENS[bisect_left(TOKENS, step.num_tokens)]
            size = min(SAMPLES[bisect_left(SAMPLES, len(sampled))], padded_size(self._max_rows, self._sizes), tokens)
        longest = max((request.length for request in sampled), default=0)
        bounds = (FEW_KEYS, *CONTEXT_BOUNDS) if size in self._short_sizes else CONTEXT_BOUNDS
        return Key(
            size=size,
            bound=min(bounds[bisect_left(bounds, longest)], self._max_len),
            tile_members=step.cascade.tile_members if step.cascade else 0,
            wanted=wanted,
            masked=masked,
            tokens=tokens,
        )

    def _room(self, key: Key) -> Room:
        tiles = key.tokens // self.rows.query_block + CHUNKS
        return Room(decodes=key.size, chunks=CHUNKS + 1, tokens=key.tokens, samples=key.size, tiles=tiles)

    def _forget_inputs(self) -> None:
        self._loaded_rows, self._loaded_cascade = [], (0, None)

    def _capture(self, key: Key) -> bool:
        """Make the graph of a key; without memory for it, go on without graphs of its size and above. One with chunks
        is made when it comes again."""
        if key.tokens and key not in self._seen_once:
            self._seen_once.add(key)
            return False
        inputs = self._new_inputs(key)
        self._cascade_in.zero_()
        self._forget_inputs()
        graph, made = None, None
        try:
            self._forward(self._batch(key, inputs), key)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                made = self._forward(self._batch(key, inputs), key)
        except torch.OutOfMemoryError:
            if graph is None and self._group.size > 1:
                raise  # the run before the capture exchanges: other ranks would wait in it
        if not self._group.min(int(made is not None)) or graph is None or made is None:
            if key.tokens:
                self.max_tokens = _below(TOKENS, key.tokens)
                log.warning("no memory to capture steps of %d tokens: they run eagerly, slower", key.tokens)
            else:
                self.max_batch = _below(self._sizes, key.size)
                log.warning("no memory to capture decode steps of %d rows: they run eagerly, slower", key.size)
            return False
        self._graphs[key] = Captured(graph, made, inputs)
        return True

    def _new_inputs(self, key: Key) -> torch.Tensor:
        """Inputs of padding only: the run before a capture changes no row."""
        if not key.tokens:
            return self._rows_in[: key.size].fill_(-1)
        padding = pack(Step(), self.rows.query_block, self._room(key))
        return torch.from_numpy(np.concatenate(list(padding.values()))).to(self.rows.device)

    def _batch(self, key: Key, inputs: torch.Tensor) -> Batch:
        """What a graph runs: it reads the inputs, and leaves them as they are."""
        cascade = None
        if key.tile_members:
            packed = self._cascade_in[: packed_length(key.size, key.tile_members)]
            cascade = CascadeTiles.unpack(packed, key.size, key.tile_members)
        if not key.tokens:
            return self.rows.decode_batch(inputs, key.bound, cascade)
        parts = pack(Step(), self.rows.query_block, self._room(key))
        on_device = dict(zip(parts, inputs.split([len(part) for part in parts.values()]), strict=True))
        return replace(self.rows.batch(on_device, key.size, key.bound, key.tokens), cascade=cascade)
