"""Captured decode steps: prepare, model, LM head, sampling and write-back as one CUDA graph, replayed with new rows.

A graph is made when its batch size is first needed (tens of milliseconds; kernels are compiled by then), so that
start-up captures nothing that is never used. Its one input is `rows`: everything else a decode step reads is in the row
table. A batch smaller than the graph is padded with row -1, which no kernel acts on. All graphs share one memory pool,
since they run one after another and a step's ids are copied out before the next replay.

Knows steps and the row table. Does not know models.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable

import torch

from minisgl.batch import Batch
from minisgl.rows import RowTable
from minisgl.scheduler import Step

log = logging.getLogger("minisgl")

# Decode time grows slowly with the batch, so padding up to the next size costs little: at most 1/3 below 32, 1/7 above.
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, *range(32, 256, 32), *range(256, 512, 64), *range(512, 4097, 128))
# The grid of attention is made for contexts up to the bound: too large a bound launches many programs that leave at
# once.
CONTEXT_BOUNDS = (1024, 8192, 32768, 131072, 1 << 30)


class DecodeGraphs:
    """Decode steps of up to `max_batch` rows; `forward` runs a batch and returns its sampled ids  # [B] int32."""

    def __init__(self, rows: RowTable, forward: Callable[[Batch], torch.Tensor], max_batch: int) -> None:
        self.rows = rows
        self.max_batch = max_batch
        self._forward = forward
        self._max_len = rows.tokens.shape[1]
        self._inputs = torch.full((BATCH_SIZES[-1],), -1, dtype=torch.int32, device=rows.device)
        self._loaded: list[int] = []  # the rows that `_inputs` starts with now
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Step) -> torch.Tensor | None:
        """Replay a decode step; its ids  # [B] are valid until the next replay. None if no graph can hold it."""
        batch = len(step.decodes)
        if step.chunks or batch > self.max_batch:
            return None
        size = BATCH_SIZES[bisect_left(BATCH_SIZES, batch)]
        longest = max(request.length for request in step.decodes)
        bound = min(CONTEXT_BOUNDS[bisect_left(CONTEXT_BOUNDS, longest)], self._max_len)
        if (size, bound) not in self._graphs and not self._capture(size, bound):
            return None
        rows = [request.row if request.row is not None else -1 for request in step.decodes] + [-1] * (size - batch)
        if rows != self._loaded:
            self._loaded = rows
            self.rows.load_decode(step, self._inputs[:size], rows)
        else:
            self.rows.load_decode(step)
        graph, ids = self._graphs[size, bound]
        graph.replay()
        return ids[:batch]

    def _capture(self, size: int, bound: int) -> bool:
        """Make the graph of a size; without memory for it, go on without graphs of this size and above."""
        inputs = self._inputs[:size].fill_(-1)  # padding only: the run before the capture changes no row
        self._loaded = []
        try:
            self._forward(self.rows.decode_batch(inputs, bound))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                ids = self._forward(self.rows.decode_batch(inputs, bound))
        except torch.OutOfMemoryError:
            self.max_batch = size - 1
            log.warning("no memory to capture decode steps of %d rows: they run eagerly, slower", size)
            return False
        self._graphs[size, bound] = graph, ids
        return True
