"""The first kernel of a forward pass: from rows to input ids, positions and KV slots.

    start    = starts[s], or length[row] where starts[s] is -1 (a decoding row: only the device need know its length)
    position = start + 0, 1, ... for the tokens of sequence s
    id       = tokens[row, position] for a decoding row; for a chunk that of `ids`, which `tokens` gets too
    slot     = page_table[row, position // page_size] * page_size + position % page_size; -1 before store_from
    length[row] = kv_lens[s] = start + number of tokens

A row of -1 is padding of a captured step: any number of tokens of no text, with kv_lens 0 and slot -1; no table is
touched.

Legend: S sequences, T tokens, R rows, M pages a row.
Bound by launch latency: a few int32 for each token. The tables of rows live on the device, so that a decode step needs
nothing from the host but `rows`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, check, use_triton


@dataclass(frozen=True)
class PreparedStep:
    """What `prepare_step` writes; all int32."""

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    kv_lens: torch.Tensor  # [S]


def prepare_step_reference(
    rows: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    store_from: torch.Tensor,
    ids: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> PreparedStep:
    """The same in torch; see `prepare_step`."""
    counts = offsets.diff()
    real = rows >= 0
    rows = rows.clamp_min(0)
    of_chunk = real & (starts >= 0)
    starts = torch.where(starts < 0, length[rows], starts)
    sequence = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    place = torch.arange(len(sequence), device=rows.device, dtype=torch.int32) - offsets[sequence]
    of_real = real[sequence]
    positions = torch.where(of_real, starts[sequence] + place, 0)
    row = rows[sequence]
    given = of_chunk[sequence]
    tokens[row[given], positions[given]] = ids[given]
    pages = page_table[row, positions // page_size]
    slots = torch.where(positions < store_from[sequence], -1, pages * page_size + positions % page_size)
    kv_lens = starts + counts
    length[rows[real]] = kv_lens[real]
    return PreparedStep(tokens[row, positions].where(of_real, 0), positions, slots.where(of_real, -1), kv_lens * real)


# The int32 inputs are slices of one upload: their alignment varies, and nothing here gains from knowing it.
@triton.jit(
    do_not_specialize=["tokens_stride", "page_table_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "offsets_ptr", "store_from_ptr", "ids_ptr"],
)
def _prepare_step_kernel(
    rows_ptr,
    starts_ptr,
    offsets_ptr,
    store_from_ptr,
    ids_ptr,
    tokens_ptr,
    tokens_stride,
    length_ptr,
    page_table_ptr,
    page_table_stride,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    kv_lens_ptr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    sequence = tl.program_id(0)
    block = tl.program_id(1)
    wait_for_previous_kernel(PDL)
    first = tl.load(offsets_ptr + sequence)
    count = tl.load(offsets_ptr + sequence + 1) - first
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    if row < 0:
        tl.store(input_ids_ptr + first + place, 0, mask=mask)
        tl.store(positions_ptr + first + place, 0, mask=mask)
        tl.store(slots_ptr + first + place, -1, mask=mask)
        tl.store(kv_lens_ptr + sequence, 0)
    elif block * BLOCK < count:
        start = tl.load(starts_ptr + sequence)
        decodes = start < 0
        if decodes:
            start = tl.load(length_ptr + row)  # one program has this row: a decoding row has one token
        position = start + place
        token = row * tokens_stride + position
        if decodes:
            ids = tl.load(tokens_ptr + token, mask=mask, other=0)
        else:
            ids = tl.load(ids_ptr + first + place, mask=mask, other=0)
            tl.store(tokens_ptr + token, ids, mask=mask)
        page = tl.load(page_table_ptr + row * page_table_stride + position // PAGE_SIZE, mask=mask, other=0)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        slot = tl.where(position < tl.load(store_from_ptr + sequence), -1, slot)
        tl.store(input_ids_ptr + first + place, ids, mask=mask)
        tl.store(positions_ptr + first + place, position, mask=mask)
        tl.store(slots_ptr + first + place, slot, mask=mask)
        if block == 0:
            tl.store(kv_lens_ptr + sequence, start + count)
            tl.store(length_ptr + row, start + count)


BLOCK = 256


def prepare_step(
    rows: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    store_from: torch.Tensor,
    ids: torch.Tensor,
    longest: int,
    tokens: torch.Tensor,
    length: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> PreparedStep:
    """Make the packed tensors of a step, and advance the row table.

    rows, starts, store_from  # [S] int32; offsets  # [S + 1] int32, of each sequence's tokens; ids  # [T] int32, read
    where a chunk has its tokens. `longest` bounds the tokens of any sequence. tokens  # [R, max_len], length  # [R] and
    page_table  # [R, M], int32, are the row table: `tokens` gets the chunks' ids, `length` the new KV lengths. Raises
    ValueError for a wrong argument.
    """
    sequences, num_tokens = len(rows), len(ids)
    check(offsets.shape == (sequences + 1,), f"offsets: expected [{sequences + 1}], got {list(offsets.shape)}")
    for name, x in (("starts", starts), ("store_from", store_from)):
        check(x.shape == rows.shape, f"{name}: expected {list(rows.shape)}, got {list(x.shape)}")
    for name, x in (("rows", rows), ("starts", starts), ("offsets", offsets), ("tokens", tokens), ("length", length)):
        check(x.dtype == torch.int32, f"{name}: expected int32, got {x.dtype}")
        check(x.device == rows.device, f"{name}: is on {x.device}, expected {rows.device}")
    if not use_triton(rows):
        return prepare_step_reference(rows, starts, offsets, store_from, ids, tokens, length, page_table, page_size)
    sizes = [num_tokens, num_tokens, num_tokens, sequences]
    input_ids, positions, slots, kv_lens = (torch.empty(n, dtype=torch.int32, device=rows.device) for n in sizes)
    _prepare_step_kernel[(sequences, cdiv(longest, BLOCK))](
        rows,
        starts,
        offsets,
        store_from,
        ids,
        tokens,
        tokens.stride(0),
        length,
        page_table,
        page_table.stride(0),
        input_ids,
        positions,
        slots,
        kv_lens,
        PAGE_SIZE=page_size,
        BLOCK=BLOCK,
        **dependent_launch(rows.device),
    )
    return PreparedStep(input_ids, positions, slots, kv_lens)
