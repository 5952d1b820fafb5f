"""The row table: where running requests live on the device, so that a decode step needs no more than their row numbers.

A step reaches the device in one packed int32 upload: which rows and chunks it has, the page-table entries that changed,
the sampling parameters of new rows, and the chunks' token ids. Everything else is made there (`kernels.prepare_step`).

Knows tensors and steps. Does not decide anything.
"""

import numpy as np
import numpy.typing as npt
import torch

from minisgl.batch import Batch
from minisgl.kernels.attention_prefill import prefill_tiles
from minisgl.kernels.prepare_step import prepare_step
from minisgl.request import Request
from minisgl.scheduler import Step

Ints = npt.NDArray[np.int32]


class RowTable:
    """R rows of device state; see `batch.py` for the legend."""

    def __init__(self, num_rows: int, max_len: int, page_size: int, query_block: int, device: torch.device) -> None:
        self.page_size = page_size
        self.query_block = query_block
        self.max_pages = -(-max_len // page_size)
        self.device = device
        self.tokens = torch.zeros(num_rows, max_len, dtype=torch.int32, device=device)
        self.length = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(num_rows, self.max_pages, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.top_p = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.seed = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def load(self, step: Step) -> Batch:
        """Upload a step, bring the tables up to date, and make the tensors of its forward pass."""
        decodes, chunks = step.decodes, step.chunks
        num_decode, num_chunks = len(decodes), len(chunks)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        counts = np.array([chunk.count for chunk in chunks], np.int32)
        chunk_offsets = offsets_of(counts)
        store_from = np.array([chunk.store_from for chunk in chunks], np.int32)
        samples = np.array([chunk.samples for chunk in chunks], bool)
        rows = [request.row for request in decodes] + [chunk.request.row for chunk in chunks]
        updates = np.array(step.page_updates, np.int32).reshape(-1, 3)
        one_each = np.arange(num_decode, dtype=np.int32)
        parts = [
            np.array(rows, np.int32),
            np.concatenate([np.full(num_decode, -1, np.int32), starts]),
            np.concatenate([one_each, chunk_offsets + np.int32(num_decode)]),
            np.concatenate([np.zeros(num_decode, np.int32), store_from]),
            np.concatenate([one_each, num_decode + np.flatnonzero(samples)]),
            np.concatenate([one_each, num_decode + chunk_offsets[1:][samples] - 1]),
            chunk_offsets,
            prefill_tiles(counts, starts + counts, self.query_block).ravel(),
            updates[:, 0] * self.max_pages + updates[:, 1],
            updates[:, 2],
            pack_params(step.new_rows),
            *(chunk.request.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks),
        ]
        (
            row_ids,
            start,
            offsets,
            store_from,
            sample_sequence,
            sample_index,
            cu_seqlens,
            tiles,
            entries,
            pages,
            params,
        ) = (upload := self._upload(parts))[:11]
        chunk_ids = upload[11] if num_chunks else row_ids[:0]

        if len(entries):
            self.page_table.view(-1)[entries] = pages
        if len(params):
            self._set_params(params.view(-1, 7))
        prepared = prepare_step(
            row_ids,
            start,
            offsets,
            store_from,
            chunk_ids,
            num_decode,
            max(1, int(counts.max(initial=0))),
            self.tokens,
            self.length,
            self.page_table,
            self.page_size,
        )
        return Batch(
            input_ids=prepared.input_ids,
            positions=prepared.positions,
            slots=prepared.slots,
            rows=row_ids,
            kv_lens=prepared.kv_lens,
            num_decode=num_decode,
            max_decode_len=max((request.length for request in decodes), default=0),
            cu_seqlens=cu_seqlens,
            tiles=tiles.view(-1, 2),
            sample_index=sample_index,
            sample_rows=row_ids[sample_sequence] if num_chunks else row_ids,
            sample_positions=prepared.kv_lens[sample_sequence] if num_chunks else prepared.kv_lens,
            page_table=self.page_table,
        )

    def reset(self) -> None:
        """Forget all rows, as after a profile run."""
        for table in (self.tokens, self.length, self.page_table):
            table.zero_()

    def _upload(self, parts: list[Ints]) -> list[torch.Tensor]:
        """Copy the parts to the device in one transfer; from the twelfth on (token ids) they stay one tensor."""
        sizes = [len(part) for part in parts[:11]] + [sum(len(part) for part in parts[11:])]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        np.concatenate(parts, out=host.numpy(), casting="same_kind")
        return list(host.to(self.device, non_blocking=True).split(sizes))

    def _set_params(self, params: torch.Tensor) -> None:
        """Fill in new rows from params  # [n, 7] int32, as `pack_params` lays them out."""
        rows = params[:, 0]
        floats = params[:, 1:4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        self.temperature[rows], self.top_p[rows], self.min_p[rows] = floats.unbind(1)
        self.top_k[rows] = params[:, 4]
        # clone: contiguous() keeps the odd strides of a single row, which cannot be viewed as another type
        self.seed[rows] = params[:, 5:7].clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(1)


def offsets_of(counts: Ints) -> Ints:
    """[0, c0, c0 + c1, ...]"""
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])


def pack_params(requests: list[Request]) -> Ints:
    """Sampling parameters in 7 words a request: row, temperature, top_p, min_p (float bits), top_k, seed (2 words)."""
    packed = np.zeros((len(requests), 7), np.int32)
    if requests:
        packed[:, 0] = np.array([request.row for request in requests], np.int32)
        params = [request.params for request in requests]
        packed[:, 1:4] = np.array([(p.temperature, p.top_p, p.min_p) for p in params], np.float32).view(np.int32)
        packed[:, 4] = [max(p.top_k or 0, 0) for p in params]
        packed[:, 5:7] = np.array([p.seed for p in params], np.int64).view(np.int32).reshape(-1, 2)
    return packed.ravel()
