"""The row table: where running requests live on the device, so that a decode step needs no more than their row numbers.

A step reaches the device in one packed int32 upload: which rows and chunks it has, the page-table entries that changed,
the sampling parameters of new rows, and the chunks' token ids. Everything else is made there (`kernels.prepare_step`).

Knows tensors and steps. Does not decide anything.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

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
    """R rows of device state; see `batch.py` for the legend. A batch has up to `most_padded` of them and padding."""

    def __init__(
        self, num_rows: int, most_padded: int, max_len: int, page_size: int, query_block: int, device: torch.device
    ) -> None:
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
        # What `batch` reads of decoding rows, the same in every step.
        self._places = places = torch.arange(most_padded + 1, dtype=torch.int32, device=device)
        self._from_length, self._zeros = torch.full_like(places, -1), torch.zeros_like(places)

    def load(self, step: Step) -> Batch:
        """Upload a step, bring the tables up to date, and make the tensors of its forward pass."""
        packed = pack(step, self.query_block)
        sample_index, kept = keep(step, packed["offsets"][len(step.decodes) :], packed["sample_index"])
        packed["sample_index"] = sample_index
        cascade = step.cascade.packed(len(step.decodes)) if step.cascade else ints([])
        on_device = upload(self.device, **packed, **kept, cascade=cascade, **self._updates(step))
        self._update(step, on_device)
        batch = self.batch(
            {name: on_device[name] for name in packed},
            len(step.decodes),
            max((request.length for request in step.decodes), default=0),
            max((chunk.count for chunk in step.chunks), default=1),
        )
        if step.cascade:
            tiles = CascadeTiles.unpack(on_device["cascade"], len(step.decodes), step.cascade.tile_members)
            batch = replace(batch, cascade=tiles)
        if kept:
            batch = replace(batch, kept=self._kept(step, {name: on_device[name] for name in kept}))
        return batch

    @staticmethod
    def _kept(step: Step, arrays: dict[str, torch.Tensor]) -> Kept:
        num_top = max(chunk.request.params.prompt_logprobs or 0 for chunk in step.chunks)
        # clone: a kernel reads them, and must not find the alignment that they have behind other parts
        return Kept(num_top=num_top, **{name: array.clone() for name, array in arrays.items()})

    def update(self, step: Step, changed: Sequence[tuple[torch.Tensor, Ints]]) -> None:
        """Bring the tables up to date for a captured step, and each of the `changed` int32 inputs."""
        if not step.page_updates and not step.new_rows and not changed:
            return
        values = {str(place): ints for place, (_, ints) in enumerate(changed)}
        on_device = upload(self.device, **values, **self._updates(step))
        for place, (inputs, _) in enumerate(changed):
            inputs.copy_(on_device[str(place)])
        self._update(step, on_device)

    def batch(self, packed: dict[str, torch.Tensor], num_decode: int, max_decode_len: int, longest: int) -> Batch:
        """The batch of what `pack` gives, on the device. Reads nothing of the host, so it can be captured;
        `max_decode_len` bounds the lengths of rows that decode, `longest` the tokens of any sequence."""
        rows, offsets = packed["rows"], packed["offsets"]
        tables = self.tokens, self.length, self.page_table, self.page_size
        prepared = prepare_step(rows, packed["starts"], offsets, packed["store_from"], packed["ids"], longest, *tables)
        tiles, sample_rows, sample_positions = packed["tiles"].view(-1, 2), rows, prepared.kv_lens
        if len(tiles) > 1:
            sample_rows, sample_positions = (x[packed["sample_sequence"]] for x in (sample_rows, sample_positions))
        return Batch(
            input_ids=prepared.input_ids,
            positions=prepared.positions,
            slots=prepared.slots,
            rows=rows,
            kv_lens=prepared.kv_lens,
            num_decode=num_decode,
            max_decode_len=max_decode_len,
            cu_seqlens=offsets[num_decode:],
            tiles=tiles,
            sample_index=packed["sample_index"],
            sample_rows=sample_rows,
            sample_positions=sample_positions,
            page_table=self.page_table,
        )

    def decode_batch(self, rows: torch.Tensor, max_len: int, cascade: CascadeTiles | None = None) -> Batch:
        """The batch of one token for each of `rows`  # [B] int32 on the device; -1 is padding. Can be captured too;
        `max_len` bounds the rows' lengths."""
        size = len(rows)
        zeros, places = self._zeros[:size], self._places[:size]
        packed = {
            "rows": rows,
            "starts": self._from_length[:size],
            "offsets": self._places[: size + 1],
            "store_from": zeros,
            "ids": zeros,
            "tiles": self._zeros[:2],
            "sample_index": places,
        }
        return replace(self.batch(packed, size, max_len, 1), cascade=cascade)

    def reset(self) -> None:
        """Forget all rows, as after a profile run."""
        for table in (self.tokens, self.length, self.page_table):
            table.zero_()

    def _updates(self, step: Step) -> dict[str, Ints]:
        """What a step changes in the tables: flat places in the page table and the pages that go there; new rows."""
        updates = np.array(step.page_updates, np.int32).reshape(-1, 3)
        entries = updates[:, 0] * self.max_pages + updates[:, 1]
        return {"table_entries": entries, "pages": updates[:, 2], "params": pack_params(step.new_rows)}

    def _update(self, step: Step, on_device: dict[str, torch.Tensor]) -> None:
        if step.page_updates:
            self.page_table.view(-1)[on_device["table_entries"]] = on_device["pages"]
        if step.new_rows:
            self._set_params(on_device["params"].view(-1, PARAMS_WORDS))
            self.edits.update(step.new_rows)

    def _set_params(self, params: torch.Tensor) -> None:
        """Fill in new rows from params  # [n, PARAMS_WORDS] int32, as `pack_params` lays them out."""
        rows = params[:, 0]
        floats = params[:, 1:4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        self.temperature[rows], self.top_p[rows], self.min_p[rows] = floats.unbind(1)
        self.top_k[rows] = params[:, 4]
        # clone: contiguous() keeps the odd strides of a single row, which cannot be viewed as another type
        self.seed[rows] = params[:, 5:7].clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(1)


class Room(NamedTuple):
    """How many of each a packed step has room for; see the legend."""

    decodes: int
    chunks: int
    tokens: int
    samples: int
    tiles: int


def pack(step: Step, query_block: int, room: Room | None = None) -> dict[str, Ints]:
    """A step as flat arrays, for `RowTable.batch`; as long as the step needs, or as `room` says.

    In a room the last sequence is padding, which has the tokens that are left; so it must be one longer than the
    chunks are. Samples that are left are of this sequence.
    """
    chunks, num_decode = step.chunks, len(step.decodes)
    starts, counts, store_from = (
        np.array([(chunk.start, chunk.count, chunk.store_from) for chunk in chunks], np.int32).reshape(-1, 3).T
    )
    ends_prompt = np.flatnonzero(ints([chunk.samples for chunk in chunks]))
    tiles = prefill_tiles(counts, starts + counts, query_block).ravel()
    num_tokens, num_samples = num_decode + int(counts.sum()), num_decode + len(ends_prompt)
    room = room or Room(num_decode, len(chunks), num_tokens, num_samples, len(tiles) // 2 - 1)
    sequences = room.decodes + room.chunks
    decode, chunk = slice(num_decode), slice(room.decodes, room.decodes + len(chunks))

    def of_sequences(default: int, decodes: Ints | int, of_chunks: Ints) -> Ints:
        values = np.full(sequences, default, np.int32)
        values[decode], values[chunk] = decodes, of_chunks
        return values

    lengths = of_sequences(0, 1, counts)
    lengths[-1] += room.tokens - num_tokens
    offsets = np.concatenate([ints([0]), np.cumsum(lengths, dtype=np.int32)])
    sample_sequence = np.full(room.samples, sequences - 1, np.int32)
    sample_sequence[:num_samples] = np.concatenate([np.arange(num_decode), room.decodes + ends_prompt])
    texts = [request.request.tokens[request.start : request.start + request.count] for request in chunks]
    return {
        "rows": of_sequences(-1, ints([r.row for r in step.decodes]), ints([c.request.row for c in chunks])),
        "starts": of_sequences(-1, -1, starts),
        "offsets": offsets,
        "store_from": of_sequences(0, 0, store_from),
        "ids": np.concatenate([ints([0] * num_decode), *texts, ints([0] * (room.tokens - num_tokens))]),
        "tiles": np.concatenate([tiles, ints([0] * (2 + 2 * room.tiles - len(tiles)))]),
        "sample_sequence": sample_sequence,
        "sample_index": offsets[sample_sequence + 1] - 1,
    }


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
