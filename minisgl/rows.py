"""The row table: where running requests live on the device, so that a decode step needs no more than their row numbers.

A step reaches the device in one packed int32 upload: which rows and chunks it has, the page-table entries that changed,
the sampling parameters of new rows, and the chunks' token ids. Everything else is made there (`kernels.prepare_step`).

Knows tensors and steps. Does not decide anything.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minisgl.batch import Batch, Kept
from minisgl.kernels.attention_cascade import CascadeTiles
from minisgl.kernels.attention_prefill import prefill_tiles
from minisgl.kernels.prepare_step import prepare_step
from minisgl.request import Request
from minisgl.row_edits import RowEdits
from minisgl.scheduler import Step
from minisgl.upload import Ints, ints, upload

PARAMS_WORDS = 7  # of a new row in the upload


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
        self.edits = RowEdits(self.tokens)
        # What `prepare_step` reads of decoding rows, the same in every step (a padded batch may exceed the rows).
        sizes = torch.arange(2 * num_rows + 2, dtype=torch.int32, device=device)
        self._one_each, self._from_length, self._store_all = sizes, torch.full_like(sizes, -1), torch.zeros_like(sizes)

    def load(self, step: Step) -> Batch:
        """Upload a step, bring the tables up to date, and make the tensors of its forward pass."""
        decodes, chunks = step.decodes, step.chunks
        num_decode = len(decodes)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        counts = np.array([chunk.count for chunk in chunks], np.int32)
        store_from = np.array([chunk.store_from for chunk in chunks], np.int32)
        ends_prompt = np.array([chunk.samples for chunk in chunks], bool)
        cu_seqlens = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
        table_entries, pages = self._table_updates(step)
        each_decode = np.arange(num_decode, dtype=np.int32)
        sample_index = np.concatenate([each_decode, num_decode + cu_seqlens[1:][ends_prompt] - 1])
        kept_index, kept = keep(step, num_decode + cu_seqlens, sample_index)
        on_device = upload(
            self.device,
            rows=ints([request.row for request in decodes] + [chunk.request.row for chunk in chunks]),
            starts=np.concatenate([np.full(num_decode, -1, np.int32), starts]),
            offsets=np.concatenate([each_decode, num_decode + cu_seqlens]),
            store_from=np.concatenate([np.zeros(num_decode, np.int32), store_from]),
            cu_seqlens=cu_seqlens,
            tiles=prefill_tiles(counts, starts + counts, self.query_block).ravel(),
            sample_sequence=np.concatenate([each_decode, num_decode + np.flatnonzero(ends_prompt)]),
            sample_index=kept_index,
            **kept,
            table_entries=table_entries,
            pages=pages,
            params=pack_params(step.new_rows),
            cascade=step.cascade.packed(num_decode) if step.cascade else ints([]),
            chunk_ids=np.concatenate([ints([])] + [c.request.tokens[c.start : c.start + c.count] for c in chunks]),
        )
        rows, sample_sequence = on_device["rows"], on_device["sample_sequence"]
        self._set_pages(on_device)
        if step.new_rows:
            self._set_params(on_device["params"].view(-1, PARAMS_WORDS))
            self.edits.update(step.new_rows)
        prepared = prepare_step(
            rows,
            on_device["starts"],
            on_device["offsets"],
            on_device["store_from"],
            on_device["chunk_ids"],
            num_decode,
            int(counts.max(initial=1)),
            self.tokens,
            self.length,
            self.page_table,
            self.page_size,
        )
        tile_members = step.cascade.tile_members if step.cascade else 0
        return Batch(
            input_ids=prepared.input_ids,
            positions=prepared.positions,
            slots=prepared.slots,
            rows=rows,
            kv_lens=prepared.kv_lens,
            num_decode=num_decode,
            max_decode_len=max((request.length for request in decodes), default=0),
            cu_seqlens=on_device["cu_seqlens"],
            tiles=on_device["tiles"].view(-1, 2),
            sample_index=on_device["sample_index"],
            sample_rows=rows[sample_sequence] if chunks else rows,
            sample_positions=prepared.kv_lens[sample_sequence] if chunks else prepared.kv_lens,
            page_table=self.page_table,
            cascade=CascadeTiles.unpack(on_device["cascade"], num_decode, tile_members) if step.cascade else None,
            kept=self._kept(step, {name: on_device[name] for name in kept}) if kept else None,
        )

    @staticmethod
    def _kept(step: Step, arrays: dict[str, torch.Tensor]) -> Kept:
        num_top = max(chunk.request.params.prompt_logprobs or 0 for chunk in step.chunks)
        # clone: a kernel reads them, and must not find the alignment that they have behind other parts
        return Kept(num_top=num_top, **{name: array.clone() for name, array in arrays.items()})

    def load_decode(self, step: Step, changed: Sequence[tuple[torch.Tensor, Ints]]) -> None:
        """Bring the page table up to date for a step of decodes only, and each of the `changed` int32 inputs."""
        if not step.page_updates and not changed:
            return
        table_entries, pages = self._table_updates(step)
        values = {str(place): ints for place, (_, ints) in enumerate(changed)}
        on_device = upload(self.device, **values, table_entries=table_entries, pages=pages)
        for place, (inputs, _) in enumerate(changed):
            inputs.copy_(on_device[str(place)])
        self._set_pages(on_device)

    def decode_batch(self, rows: torch.Tensor, max_len: int, cascade: CascadeTiles | None = None) -> Batch:
        """The batch of one token for each of `rows`  # [B] int32 on the device; -1 is padding. Reads nothing of the
        host, so it can be captured; `max_len` bounds the rows' lengths."""
        batch = len(rows)
        prepared = prepare_step(
            rows,
            self._from_length[:batch],
            self._one_each[: batch + 1],
            self._store_all[:batch],
            rows[:0],
            batch,
            1,
            self.tokens,
            self.length,
            self.page_table,
            self.page_size,
        )
        return Batch(
            input_ids=prepared.input_ids,
            positions=prepared.positions,
            slots=prepared.slots,
            rows=rows,
            kv_lens=prepared.kv_lens,
            num_decode=batch,
            max_decode_len=max_len,
            cu_seqlens=rows[:0],
            tiles=rows[:0].view(-1, 2),
            sample_index=self._one_each[:batch],
            sample_rows=rows,
            sample_positions=prepared.kv_lens,
            page_table=self.page_table,
            cascade=cascade,
        )

    def reset(self) -> None:
        """Forget all rows, as after a profile run."""
        for table in (self.tokens, self.length, self.page_table):
            table.zero_()

    def _table_updates(self, step: Step) -> tuple[Ints, Ints]:
        """Flat places in the page table that the step changes, and the pages that go there."""
        updates = np.array(step.page_updates, np.int32).reshape(-1, 3)
        return updates[:, 0] * self.max_pages + updates[:, 1], updates[:, 2]

    def _set_pages(self, on_device: dict[str, torch.Tensor]) -> None:
        if len(on_device["pages"]):
            self.page_table.view(-1)[on_device["table_entries"]] = on_device["pages"]

    def _set_params(self, params: torch.Tensor) -> None:
        """Fill in new rows from params  # [n, PARAMS_WORDS] int32, as `pack_params` lays them out."""
        rows = params[:, 0]
        floats = params[:, 1:4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        self.temperature[rows], self.top_p[rows], self.min_p[rows] = floats.unbind(1)
        self.top_k[rows] = params[:, 4]
        # clone: contiguous() keeps the odd strides of a single row, which cannot be viewed as another type
        self.seed[rows] = params[:, 5:7].clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(1)


def keep(step: Step, offsets: Ints, sample_index: Ints) -> tuple[Ints, dict[str, Ints]]:
    """(packed tokens that leave the model, ascending; the arrays of `Kept` by name) for a step whose chunks begin at
    `offsets`. The arrays are empty where no chunk scores or pools."""
    before, ids, pooled = [], [], []
    for chunk, offset in zip(step.chunks, offsets.tolist(), strict=False):
        shift = offset - chunk.start
        before.append(np.arange(chunk.scored[0], chunk.scored[1], dtype=np.int32) - 1 + shift)
        ids.append(chunk.request.tokens[slice(*chunk.scored)])
        pooled.append(np.arange(*chunk.pooled, dtype=np.int32) + shift)
    sizes = [len(one) for one in pooled if len(one)]
    if not sizes and not any(map(len, ids)):
        return sample_index, {}
    index = np.unique(np.concatenate([sample_index, *before, *pooled]))
    before_scored, pooled_places, sampled = (
        np.searchsorted(index, np.concatenate([ints([]), *tokens])).astype(np.int32)
        for tokens in (before, pooled, [sample_index])
    )
    scored_ids = np.concatenate([ints([]), *ids])
    return index, {
        "sampled": sampled,
        "before_scored": before_scored,
        "scored_ids": scored_ids,
        "pooled": pooled_places,
        "pool_sizes": ints(sizes),
    }


def pack_params(requests: list[Request]) -> Ints:
    """PARAMS_WORDS a request: row, temperature, top_p and min_p (float bits), top_k, seed (2 words)."""
    packed = np.zeros((len(requests), PARAMS_WORDS), np.int32)
    if requests:
        packed[:, 0] = ints([request.row for request in requests])
        params = [request.params for request in requests]
        packed[:, 1:4] = np.array([(p.temperature, p.top_p, p.min_p) for p in params], np.float32).view(np.int32)
        packed[:, 4] = [max(p.top_k or 0, 0) for p in params]
        packed[:, 5:7] = np.array([p.seed for p in params], np.int64).view(np.int32).reshape(-1, 2)
    return packed.ravel()
