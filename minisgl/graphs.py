"""Captured decode steps: prepare, model, LM head, sampling and write-back as one CUDA graph, replayed with new rows.

A graph is made when its batch size is first needed (tens of milliseconds; kernels are compiled by then), so that
start-up captures nothing that is never used. Its inputs are `rows` and, where some share a prefix, tiles of them:
everything else a decode step reads is in the row table. A batch smaller than the graph is padded with row -1, which no
kernel acts on. Ranks make the same graphs, or none of them does. All graphs share one memory pool, since they run one
after another and a step's ids are copied out before the next replay.

Knows steps and the row table. Does not know models.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

from minisgl.batch import Batch
from minisgl.cascade import CascadePlan, packed_length
from minisgl.forward import Forward, Wanted
from minisgl.kernels.attention_cascade import CascadeTiles
from minisgl.parallel import ParallelGroup
from minisgl.rows import RowTable
from minisgl.scheduler import Step
from minisgl.upload import ints

log = logging.getLogger("minisgl")

# Decode time grows slowly with the batch, so padding up to the next size costs little: at most 1/3 below 32, 1/7 above.
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, *range(32, 256, 32), *range(256, 512, 64), *range(512, 4097, 128))
# The grid of attention is made for contexts up to the bound: too large a bound launches many programs that leave at
# once.
CONTEXT_BOUNDS = (1024, 8192, 32768, 131072, 1 << 30)


def padded_size(batch: int) -> int:
    """The size of the graph that holds a batch."""
    return BATCH_SIZES[bisect_left(BATCH_SIZES, batch)] if batch <= BATCH_SIZES[-1] else batch


class Key(NamedTuple):
    """What a graph is made for."""

    size: int  # of the batch, padding included
    bound: int  # on the rows' lengths
    tile_members: int  # of the tiles of a shared prefix; 0: no row shares one
    wanted: Wanted
    masked: bool  # ends with logits, which are sampled once the masks are there


class DecodeGraphs:
    """Decode steps of up to `max_batch` rows; `forward` runs a batch as a key says."""

    def __init__(
        self, rows: RowTable, forward: Callable[[Batch, Key], Forward], max_batch: int, group: ParallelGroup
    ) -> None:
        self.rows = rows
        self.max_batch = max_batch
        self._forward = forward
        self._group = group
        self._max_len = rows.tokens.shape[1]
        # The inputs of all graphs, each of which reads their start; and what they start with now.
        self._rows_in = torch.full((BATCH_SIZES[-1],), -1, dtype=torch.int32, device=rows.device)
        self._cascade_in = torch.zeros(4 * BATCH_SIZES[-1], dtype=torch.int32, device=rows.device)
        self._loaded_rows: list[int | None]
        self._loaded_cascade: tuple[int, CascadePlan | None]
        self._forget_inputs()
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Forward]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def keys(self) -> list[Key]:
        """What graphs were made for, in their order."""
        return list(self._graphs)

    def run(self, step: Step, wanted: Wanted, masked: bool) -> Forward | None:
        """Replay a decode step; what it made is valid until the next replay. None if no graph can hold it."""
        batch = len(step.decodes)
        if step.chunks or batch > self.max_batch:
            return None
        longest = max(request.length for request in step.decodes)
        key = Key(
            size=padded_size(batch),
            bound=min(CONTEXT_BOUNDS[bisect_left(CONTEXT_BOUNDS, longest)], self._max_len),
            tile_members=step.cascade.tile_members if step.cascade else 0,
            wanted=wanted,
            masked=masked,
        )
        if key not in self._graphs and not self._capture(key):
            return None
        changed = []
        rows, cascade = [request.row for request in step.decodes] + [-1] * (key.size - batch), self._loaded_cascade
        if rows != self._loaded_rows:
            changed.append((self._rows_in[: key.size], ints(rows)))
        if step.cascade and (key.size, step.cascade) != cascade:
            cascade = key.size, step.cascade
            packed = step.cascade.packed(key.size)
            changed.append((self._cascade_in[: len(packed)], packed))
        self._forget_inputs()  # what a transfer that fails leaves there is not known
        self.rows.load_decode(step, changed)
        self._loaded_rows, self._loaded_cascade = rows, cascade
        graph, made = self._graphs[key]
        graph.replay()
        return made.first(batch)

    def _forget_inputs(self) -> None:
        self._loaded_rows, self._loaded_cascade = [], (0, None)

    def _capture(self, key: Key) -> bool:
        """Make the graph of a key; without memory for it, go on without graphs of its size and above."""
        inputs = self._rows_in[: key.size].fill_(-1)  # padding only: the run before the capture changes no row
        cascade = None
        if key.tile_members:
            packed = self._cascade_in[: packed_length(key.size, key.tile_members)].zero_()
            cascade = CascadeTiles.unpack(packed, key.size, key.tile_members)
        self._forget_inputs()
        graph, made = None, None
        try:
            self._forward(self.rows.decode_batch(inputs, key.bound, cascade), key)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                made = self._forward(self.rows.decode_batch(inputs, key.bound, cascade), key)
        except torch.OutOfMemoryError:
            if graph is None and self._group.size > 1:
                raise  # the run before the capture exchanges: other ranks would wait in it
        if not self._group.min(int(made is not None)) or graph is None or made is None:
            self.max_batch = key.size - 1
            log.warning("no memory to capture decode steps of %d rows: they run eagerly, slower", key.size)
            return False
        self._graphs[key] = graph, made
        return True
