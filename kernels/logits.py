"""Edit logits before sampling: biases and bans, penalties, and masks of allowed tokens.

    1. logit = -inf where position < bias_from, else logit + bias     for each bias of the row: `logit_bias`, and
                                                                      min_tokens (stop ids, until then)
       logit = -inf where the output ends with what precedes the id   for each ban of the row: bad words
    2. logit = logit / repetition if logit > 0 else logit * repetition           for each distinct token of the text
    3. logit = logit - frequency * count - presence, count its occurrences       for each distinct token of the output
    4. logit = -inf                                                   where the row's mask has no bit

The order is vLLM's; repetition is that of transformers, presence and frequency those of the OpenAI API. Edits are
computed in fp32 and rounded to the logits' dtype after step 1 and after step 3.

Legend: N samples, V vocabulary, R rows, K biases and J bans a row at most, C tokens a ban at most, M masks,
W = ceil(V / 32) words. logits  # [N, V].

Where ranks share a vocabulary, each edits the columns of its own slice, and `counts` has as many.

Bound by memory, and by what is asked for: the text of rows with penalties, and 4,096 logits a program of rows with a
mask. Other rows leave after a few loads; a batch that asks for nothing does not launch.

A penalty applies once a distinct token, so occurrences must be counted first. `counts`  # [N, V] is all zeros between
calls: the first launch adds the text's tokens to it, the second takes each count out atomically, and of all the places
that hold a token, the one that gets the count applies the penalty. So the work follows the length of the text, not V,
and no state has to follow a row through preemption and reuse, as counts kept from step to step would.
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import cdiv, check, check_same, next_power_of_2, use_triton

TEXT_TOKENS = 1024  # of a program: 8 a thread
MASK_WORDS = 128  # of a program: 4,096 logits, 32 a thread
NUM_WARPS = 4
IN_PROMPT = tl.constexpr(1 << 30)  # in a count: the prompt has the token; below it, occurrences in the output


@dataclass(frozen=True)
class Edits:
    """What each row asks for; R rows, all of one device. The values here ask for nothing: `Edits.none`."""

    prompt_length: torch.Tensor  # [R] int32, tokens before the output
    repetition: torch.Tensor  # [R] fp32, above 0; 1: off
    presence: torch.Tensor  # [R] fp32; 0: off
    frequency: torch.Tensor  # [R] fp32; 0: off
    bias_ids: torch.Tensor  # [R, K] int32, distinct in a row; -1: none
    biases: torch.Tensor  # [R, K] fp32, -inf bans
    bias_from: torch.Tensor  # [R, K] int32, position of the first token that may be this id
    bans: (
        torch.Tensor
    )  # [R, J, C] int32, the banned id last, before it the output tokens that it may not follow; -1: none

    @classmethod
    def none(
        cls, num_rows: int, max_biases: int, device: torch.device, *, max_bans: int = 1, max_ban_tokens: int = 1
    ) -> "Edits":
        """Tables that ask for nothing."""

        def table(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((num_rows, *shape), value, dtype=dtype, device=device)

        whole, real = torch.int32, torch.float32
        rates = (table(1, real), table(0, real), table(0, real))
        return cls(
            table(0, whole),
            *rates,
            table(-1, whole, max_biases),
            table(0, real, max_biases),
            table(0, whole, max_biases),
            table(-1, whole, max_bans, max_ban_tokens),
        )


def edit_logits_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    edits: Edits,
    masks: torch.Tensor | None = None,
    mask_of: torch.Tensor | None = None,
    first_id: int = 0,
) -> torch.Tensor:
    """The same in torch, row by row; see `edit_logits`, whose num_ids are all columns here."""
    vocab = logits.shape[1]

    def here(ids: torch.Tensor) -> torch.Tensor:
        return (ids >= first_id) & (ids < first_id + vocab)

    for sample, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        if row < 0:
            continue
        used = (edits.bias_ids[row] >= 0) & here(edits.bias_ids[row])
        ids = edits.bias_ids[row][used].long() - first_id
        biased = logits[sample, ids].float() + edits.biases[row][used]
        logits[sample, ids] = biased.masked_fill(position < edits.bias_from[row][used], -torch.inf).to(logits.dtype)

        text, prompt = tokens[row, :position].long(), int(edits.prompt_length[row])
        for *before, banned in edits.bans[row].tolist():
            before = [token for token in before if token >= 0]
            column = banned - first_id
            if banned >= 0 and 0 <= column < vocab and text[max(prompt, position - len(before)) :].tolist() == before:
                logits[sample, column] = -torch.inf

        repetition, presence, frequency = (x[row] for x in (edits.repetition, edits.presence, edits.frequency))
        seen, count = (torch.bincount(part[here(part)] - first_id, minlength=vocab) for part in (text, text[prompt:]))
        x = logits[sample].float()
        x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        x = torch.where(count > 0, x - frequency * count - presence, x)
        logits[sample] = x.to(logits.dtype)

        if masks is not None and mask_of is not None and mask_of[sample] >= 0:
            bits = masks[mask_of[sample]][:, None] >> torch.arange(32, device=logits.device) & 1
            logits[sample].masked_fill_(bits.flatten()[first_id : first_id + vocab] == 0, -torch.inf)
    return logits


@triton.jit
def _text_of_program(
    row,
    position,
    tokens_ptr,
    tokens_stride,
    prompt_length_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    TEXT_TOKENS: tl.constexpr,
    FIRST_ID: tl.constexpr,
    NUM_IDS: tl.constexpr,
):
    """(places, their tokens' columns, which count, prompt length, the three penalties): none counts without
    penalties."""
    prompt_length = tl.load(prompt_length_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    places = tl.program_id(1) * TEXT_TOKENS + tl.arange(0, TEXT_TOKENS)
    start = tl.where(repetition != 1.0, 0, prompt_length)
    end = tl.where((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0), position, 0)
    counted = (places >= start) & (places < end)
    text = tl.load(tokens_ptr + row * tokens_stride + places, mask=counted, other=0)
    if NUM_IDS > 0:
        text -= FIRST_ID
        counted = counted & (text >= 0) & (text < NUM_IDS)
    return places, text, counted, prompt_length, repetition, presence, frequency


@triton.jit
def _columns(ids, FIRST_ID: tl.constexpr, NUM_IDS: tl.constexpr):
    """The columns of ids in the slice; -1 for others."""
    columns = ids - FIRST_ID
    return tl.where((columns >= 0) & (columns < NUM_IDS), columns, -1)


# All but logits and counts are read a few values at a time, and may be slices of any alignment.
NARROW = ["rows_ptr", "positions_ptr", "tokens_ptr", "tokens_stride", "num_biases", "num_bans"]
NARROW += ["masks_ptr", "masks_stride"]


@triton.jit(do_not_specialize=NARROW)
def _count_and_bias_kernel(
    logits_ptr,
    logits_stride,
    counts_ptr,
    counts_stride,
    rows_ptr,
    positions_ptr,
    tokens_ptr,
    tokens_stride,
    prompt_length_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    bias_ids_ptr,
    biases_ptr,
    bias_from_ptr,
    num_biases,
    bans_ptr,
    num_bans,
    TEXT_TOKENS: tl.constexpr,
    BLOCK_BIASES: tl.constexpr,
    BLOCK_BANS: tl.constexpr,
    BAN_TOKENS: tl.constexpr,
    FIRST_ID: tl.constexpr,
    NUM_IDS: tl.constexpr,
):
    """Add a part of the text to the counts; the first program of a sample also applies its biases and bans."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sample).to(tl.int64)
    if row < 0:
        return
    position = tl.load(positions_ptr + sample)
    places, text, counted, prompt_length, _, _, _ = _text_of_program(
        row,
        position,
        tokens_ptr,
        tokens_stride,
        prompt_length_ptr,
        repetition_ptr,
        presence_ptr,
        frequency_ptr,
        TEXT_TOKENS,
        FIRST_ID,
        NUM_IDS,
    )
    count = counts_ptr + sample * counts_stride + text
    in_prompt = places < prompt_length
    tl.atomic_or(count, IN_PROMPT, mask=counted & in_prompt, sem="relaxed")
    tl.atomic_add(count, 1, mask=counted & ~in_prompt, sem="relaxed")
    if tl.program_id(1) == 0:
        slots = tl.arange(0, BLOCK_BIASES)
        of_row = row * num_biases + slots
        ids = tl.load(bias_ids_ptr + of_row, mask=slots < num_biases, other=-1)
        if NUM_IDS > 0:
            ids = _columns(ids, FIRST_ID, NUM_IDS)
        x = tl.load(logits_ptr + sample * logits_stride + ids, mask=ids >= 0, other=0.0).to(tl.float32)
        x += tl.load(biases_ptr + of_row, mask=ids >= 0, other=0.0)
        x = tl.where(position < tl.load(bias_from_ptr + of_row, mask=ids >= 0, other=0), float("-inf"), x)
        tl.store(logits_ptr + sample * logits_stride + ids, x, mask=ids >= 0)

        slots = tl.arange(0, BLOCK_BANS)
        last = bans_ptr + (row * num_bans + slots) * BAN_TOKENS + BAN_TOKENS - 1
        banned_ids = tl.load(last, mask=slots < num_bans, other=-1)
        if NUM_IDS > 0:
            banned_ids = _columns(banned_ids, FIRST_ID, NUM_IDS)
        banned = banned_ids >= 0
        for back in tl.static_range(1, BAN_TOKENS):
            wanted = tl.load(last - back, mask=banned, other=-1)
            place = position - back
            found = tl.load(tokens_ptr + row * tokens_stride + place, mask=place >= prompt_length, other=-1)
            banned = banned & ((wanted < 0) | (wanted == found))
        tl.debug_barrier()  # the biases of the same ids are stored
        minus_inf = tl.full(slots.shape, float("-inf"), tl.float32)
        tl.store(logits_ptr + sample * logits_stride + banned_ids, minus_inf, mask=banned)


@triton.jit(do_not_specialize=[*NARROW, "mask_of_ptr"])
def _penalize_and_mask_kernel(
    logits_ptr,
    logits_stride,
    counts_ptr,
    counts_stride,
    rows_ptr,
    positions_ptr,
    tokens_ptr,
    tokens_stride,
    prompt_length_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    masks_ptr,
    masks_stride,
    mask_of_ptr,
    VOCAB: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    TEXT_TOKENS: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    FIRST_ID: tl.constexpr,
    NUM_IDS: tl.constexpr,
):
    """Penalize the tokens of a part of the text; mask a part of the vocabulary. Each id is written by one of both."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sample).to(tl.int64)
    if row < 0:
        return
    logits_row = logits_ptr + sample * logits_stride
    mask_number = tl.load(mask_of_ptr + sample).to(tl.int64) if HAS_MASKS else -1
    _, text, counted, _, repetition, presence, frequency = _text_of_program(
        row,
        tl.load(positions_ptr + sample),
        tokens_ptr,
        tokens_stride,
        prompt_length_ptr,
        repetition_ptr,
        presence_ptr,
        frequency_ptr,
        TEXT_TOKENS,
        FIRST_ID,
        NUM_IDS,
    )
    # An exchange with 0, which Triton 3.6 cannot compile for AMD.
    count = tl.atomic_and(counts_ptr + sample * counts_stride + text, 0, mask=counted, sem="relaxed")
    first = counted & (count > 0)
    if HAS_MASKS:
        mask_row = masks_ptr + tl.maximum(mask_number, 0) * masks_stride
        masked_ids = tl.where(mask_number >= 0, VOCAB, 0)
        words_of_text = tl.load(mask_row + text // 32, mask=first & (text < masked_ids), other=-1)
        first = first & (((words_of_text >> (text % 32)) & 1) != 0)
    x = tl.load(logits_row + text, mask=first, other=0.0).to(tl.float32)
    x = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    occurrences = (count & (IN_PROMPT - 1)).to(tl.float32)
    x = tl.where(occurrences > 0.0, x - frequency * occurrences - presence, x)
    tl.store(logits_row + text, x, mask=first)

    if HAS_MASKS and mask_number >= 0:
        numbers = tl.program_id(1) * MASK_WORDS + tl.arange(0, MASK_WORDS)
        words = tl.load(mask_row + numbers, mask=numbers * 32 < VOCAB, other=0)
        bits = tl.arange(0, 32)[None, :]
        ids = numbers[:, None] * 32 + bits
        banned = ((words[:, None] >> bits) & 1) == 0
        tl.store(logits_row + ids, tl.full(ids.shape, float("-inf"), tl.float32), mask=banned & (ids < VOCAB))


def edit_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    max_position: int,
    edits: Edits,
    counts: torch.Tensor,
    masks: torch.Tensor | None = None,
    mask_of: torch.Tensor | None = None,
    *,
    first_id: int = 0,
    num_ids: int | None = None,
) -> torch.Tensor:
    """Edit logits  # [N, V] in place, and return them.

    logits        # [N, V] fp32, bf16 or fp16; rows may be strided
    rows          # [N] int32, row of the tables; -1: padding, left alone
    positions     # [N] int32, place of the token to sample: the text is tokens[row, :position]
    tokens        # [R, max_len] int32
    max_position  no position is above it; sizes the launch, so a captured one must cover all that will come
    counts        # [at least N, V] int32 zeros, kept from call to call: zeros again afterwards
    masks         # [M, W] int32, bit id % 32 of word id // 32: may the id be sampled?
    mask_of       # [N] int32, the mask of each sample; -1: none
    first_id      of the logits, a multiple of 32: they are a slice of the vocabulary where num_ids is given
    num_ids       of the slice, whose other columns are padding and left alone; masks are those of the whole vocabulary

    Ids, rows, positions and mask numbers must be inside their tables (not checked: it would synchronise).
    Raises ValueError for a wrong shape, stride, dtype or device.
    """
    check(logits.dim() == 2, f"logits: expected [N, V], got {list(logits.shape)}")
    check(logits.stride(-1) == 1, "logits: last dimension must be contiguous")
    check(logits.is_floating_point() and logits.dtype != torch.float64, f"logits: has dtype {logits.dtype}")
    is_slice = num_ids is not None
    check(first_id % 32 == 0 and (is_slice or first_id == 0), f"first_id: {first_id} is not where a slice may begin")
    if num_ids is not None:
        check(0 <= num_ids <= logits.shape[1], f"num_ids: {num_ids} of {logits.shape[1]} columns")
        if num_ids == 0:  # of a rank that has padding alone
            return logits
    whole, logits = logits, logits[:, :num_ids]
    samples, vocab = logits.shape
    num_rows, num_biases = edits.bias_ids.shape
    check(edits.bans.dim() == 3, f"bans: expected [{num_rows}, J, C], got {list(edits.bans.shape)}")
    num_bans, ban_tokens = edits.bans.shape[1:]
    of_sample = [("rows", rows), ("positions", positions)] + ([("mask_of", mask_of)] if mask_of is not None else [])
    for name, x in of_sample:
        check(x.shape == (samples,), f"{name}: expected [{samples}], got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, x, device=logits.device, dtype=torch.int32)
    real = ("repetition", "presence", "frequency", "biases")
    for field in fields(edits):
        name, x = field.name, getattr(edits, field.name)
        shape = [num_rows, num_biases] if "bias" in name else [num_rows]
        shape = [num_rows, num_bans, ban_tokens] if name == "bans" else shape
        check(list(x.shape) == shape, f"{name}: expected {shape}, got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, x, device=logits.device, dtype=torch.float32 if name in real else torch.int32)
    check((masks is None) == (mask_of is None), "mask_of: comes with masks, or neither is given")
    tables = [("tokens", tokens, num_rows, max_position), ("counts", counts, samples, vocab)]
    tables += [("masks", masks, 0, cdiv(first_id + vocab, 32))] if masks is not None else []
    for name, x, height, width in tables:
        check(x.dim() == 2 and len(x) >= height, f"{name}: expected at least {height} rows, got {list(x.shape)}")
        check(x.shape[1] >= width, f"{name}: expected at least {width} columns, got {list(x.shape)}")
        check(x.stride(-1) == 1, f"{name}: last dimension must be contiguous")
        check_same(name, x, device=logits.device, dtype=torch.int32)
    if not use_triton(logits):
        edit_logits_reference(logits, rows, positions, tokens, edits, masks, mask_of, first_id)
        return whole
    if samples == 0:
        return whole
    if masks is not None:
        masks = masks[:, first_id // 32 :]

    text_programs = max(cdiv(max_position, TEXT_TOKENS), 1)
    mask_programs = cdiv(vocab, 32 * MASK_WORDS) if masks is not None else 0
    text = (
        *(logits, logits.stride(0), counts, counts.stride(0), rows, positions, tokens, tokens.stride(0)),
        *(edits.prompt_length, edits.repetition, edits.presence, edits.frequency),
    )
    _count_and_bias_kernel[(samples, text_programs)](
        *text,
        edits.bias_ids,
        edits.biases,
        edits.bias_from,
        num_biases,
        edits.bans,
        num_bans,
        TEXT_TOKENS=TEXT_TOKENS,
        BLOCK_BIASES=next_power_of_2(max(num_biases, 1)),
        BLOCK_BANS=next_power_of_2(max(num_bans, 1)),
        BAN_TOKENS=ban_tokens,
        FIRST_ID=first_id,
        NUM_IDS=vocab if is_slice else 0,
        num_warps=NUM_WARPS,
    )
    _penalize_and_mask_kernel[(samples, max(text_programs, mask_programs))](
        *text,
        masks,
        masks.stride(0) if masks is not None else 0,
        mask_of,
        VOCAB=vocab,
        HAS_MASKS=masks is not None,
        TEXT_TOKENS=TEXT_TOKENS,
        MASK_WORDS=MASK_WORDS,
        FIRST_ID=first_id,
        NUM_IDS=vocab if is_slice else 0,
        num_warps=NUM_WARPS,
    )
    return whole
