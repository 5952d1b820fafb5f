"""Sampling where each rank has the logits of a slice of the vocabulary: `sampling`'s draw, in steps that ranks join.

    bounds    of each row: the slice's largest logit, its softmax mass, and a logit that k of its tokens reach
    tally     how many tokens of the slice, or what mass of them, reach each of 64 pivots
    draw      the slice's best block by score, and the token drawn of it
    choose    the best of the ranks' draws

After each of the first three the ranks gather what all have found, and the next step reads that: 12, 256 and 8 bytes a
row and rank. Tallies narrow the range of the threshold that top-k and then top-p keep logits from, 64 ways a pass: in
bf16 three passes each, six in fp32. Their number is fixed, so that a graph can hold them; where no row has filters they
are left out. Every rank computes each decision from the same gathered numbers, so all come to the same token.

Scores are those of `sampling`, bit for bit, since noise depends on the numbers of tokens and blocks in the whole
vocabulary, and slices are whole blocks. A threshold may differ in the last place, as masses are added in another order.

Legend: N samples, n ranks, V ids of the slice, B blocks of it, R rows of the parameter tables, W pivots.
Bound by memory as `sampling` is, with V / n ids a rank; then by the exchanges.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels import gumbel as streams
from minisgl.kernels.gumbel import gumbel, gumbel_reference
from minisgl.kernels.launch import check, check_same, use_triton
from minisgl.kernels.token_filters import TILE, draw_listed_block
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    LARGEST,
    MASKED_KEY,
    UNUSED_BITS,
    Shape,
    blocks_reference,
    clean_reference,
    first_best,
    key_of,
    load_blocks,
    load_listed,
    smallest_of_key,
    softmax_weights,
    write_list,
)

WAYS = 64  # pivots a pass: 64 x 4,096 logits are compared at once, as long as an exchange takes
CHOOSE_BLOCK = 128  # samples a program
POINTERS = ["rows_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr"]


class Slice(NamedTuple):
    """Where a rank's logits lie in the vocabulary."""

    first_id: int  # a multiple of the blocks' size
    num_ids: int  # columns from here on are padding
    vocab: int  # ids of the whole vocabulary


class Samples(NamedTuple):
    """What is sampled, and how; see `sampling.sample`."""

    rows: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor


class Search(NamedTuple):
    """The state of each row's search for its threshold, the same on all ranks but for the list."""

    keys: torch.Tensor  # [N, 2] int64: the threshold's key is from the first to the second
    goal: torch.Tensor  # [N] fp32: what the tokens from the threshold on must reach; -1: not known yet
    listed: torch.Tensor  # [N, B] int32: blocks of the slice that can matter
    num_listed: torch.Tensor  # [N] int32


def num_passes(dtype: torch.dtype) -> int:
    """Tallies that find one key of a dtype."""
    left, passes = 2 ** (32 - UNUSED_BITS[dtype]) - 1, 0
    while left > 0:
        left, passes = left // WAYS, passes + 1
    return passes


@triton.jit
def _load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB: tl.constexpr):
    """(top-k, 0: off; top-p; min-p; whether any of them is on) of a row."""
    top_k = tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < VOCAB, tl.maximum(top_k, 0), 0)
    filtered = (temperature >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return top_k, top_p, min_p, filtered


@triton.jit
def _load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS: tl.constexpr):
    """(largest logit, softmax mass, logit that top-k tokens reach) of a row, over all ranks."""
    ranks = tl.arange(0, triton.next_power_of_2(NUM_RANKS))
    of_rank = bounds_ptr + (ranks * samples + sample) * 3
    mask = ranks < NUM_RANKS
    largest_each = tl.maximum(tl.load(of_rank, mask=mask, other=float("-inf")), -LARGEST)
    mass_each = tl.load(of_rank + 1, mask=mask, other=0.0)
    largest = tl.max(largest_each, 0)
    mass = tl.sum(mass_each * softmax_weights(largest_each, largest, temperature), 0)
    return largest, mass, tl.max(tl.load(of_rank + 2, mask=mask, other=float("-inf")), 0)


@triton.jit
def _pivots(low, high, WAYS: tl.constexpr):
    return tl.minimum(low + ((high - low) // WAYS + 1) * tl.arange(0, WAYS), high)


@triton.jit
def _narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS: tl.constexpr, WAYS: tl.constexpr):
    """(lowest key, highest key, goal) after the last tally."""
    low, high = tl.load(keys_ptr + 2 * sample), tl.load(keys_ptr + 2 * sample + 1)
    goal = tl.load(goal_ptr + sample)
    if high > low:
        totals = tl.zeros([WAYS], tl.float32)
        for rank in tl.static_range(NUM_RANKS):
            totals += tl.load(tallies_ptr + (rank * samples + sample) * WAYS + tl.arange(0, WAYS))
        goal = tl.where(goal < 0.0, top_p * tl.max(totals, 0), goal)  # the first pivot's mass is what top-k left
        pivots = _pivots(low, high, WAYS)
        reached = totals >= goal
        low = tl.max(tl.where(reached, pivots, low), 0)
        high = tl.maximum(tl.min(tl.where(reached, high, pivots - 1), 0), low)
    return low, high, goal


@triton.jit(do_not_specialize=["rows_ptr", "temperature_ptr", "top_k_ptr"])
def _bounds_kernel(
    largest_ptr,
    mass_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    out_ptr,
    SHAPE: tl.constexpr,
    VOCAB: tl.constexpr,
):
    MASKED: tl.constexpr = MASKED_KEY >> SHAPE.shift
    sample = tl.program_id(0).to(tl.int64)
    row = tl.maximum(tl.load(rows_ptr + sample), 0).to(tl.int64)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    blocks = tl.arange(0, SHAPE.lanes)
    mask = blocks < SHAPE.blocks
    block_largest = tl.load(largest_ptr + sample * SHAPE.blocks + blocks, mask=mask, other=float("-inf"))
    largest = tl.max(block_largest, 0)
    mass = 0.0
    if temperature >= GREEDY_BELOW:
        block_mass = tl.load(mass_ptr + sample * SHAPE.blocks + blocks, mask=mask, other=0.0)
        above = softmax_weights(block_largest, tl.maximum(largest, -LARGEST), temperature)
        mass = tl.sum(block_mass * above, 0)
    # The largest key that top-k blocks reach: as many tokens do.
    keys = key_of(block_largest, SHAPE)
    low = tl.full([], MASKED, tl.int64)
    high = tl.where((top_k > 0) & (top_k <= SHAPE.blocks) & (top_k < VOCAB), tl.max(keys, 0).to(tl.int64), low)
    while low < high:
        middle = high - (high - low) // 2
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    tl.store(out_ptr + sample * 3, largest)
    tl.store(out_ptr + sample * 3 + 1, mass)
    kth = tl.where(low > MASKED, smallest_of_key(low, SHAPE), float("-inf"))
    tl.store(out_ptr + sample * 3 + 2, kth)


@triton.jit(do_not_specialize=[*POINTERS, "samples"])
def _tally_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    largest_ptr,
    bounds_ptr,
    tallies_ptr,
    keys_ptr,
    goal_ptr,
    list_ptr,
    num_listed_ptr,
    out_ptr,
    samples,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    VOCAB: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    WAYS: tl.constexpr,
    BY_MASS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Narrow by the last tally, and make the next; FIRST: of a search by count (then by mass)."""
    LOWEST_KEY: tl.constexpr = (MASKED_KEY >> SHAPE.shift) + 1
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sample).to(tl.int64)
    out = out_ptr + sample * WAYS + tl.arange(0, WAYS)
    if row < 0:
        tl.store(num_listed_ptr + sample, 0)
        tl.store(keys_ptr + 2 * sample, 0)
        tl.store(keys_ptr + 2 * sample + 1, 0)
        tl.store(out, tl.zeros([WAYS], tl.float32))
        return
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p, filtered = _load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB)
    temperature = tl.where(temperature < GREEDY_BELOW, 1.0, temperature)
    largest, mass, kth = _load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS)
    of_list = list_ptr + sample * SHAPE.blocks
    top_key = key_of(largest, SHAPE).to(tl.int64)
    if FIRST and not BY_MASS:
        # Tokens below this weigh less than 1 - top_p together; 0.999 leaves room for rounding.
        top_p_cutoff = largest + temperature * tl.log(tl.maximum(1.0 - top_p, 0.0) * mass * (0.999 / VOCAB))
        min_p_cutoff = largest + temperature * tl.log(min_p)
        floor = tl.where(top_k > 0, kth, tl.maximum(top_p_cutoff, min_p_cutoff))
        low = tl.maximum(key_of(floor, SHAPE), LOWEST_KEY).to(tl.int64)
        num_listed = 0
        if filtered:
            blocks = tl.arange(0, SHAPE.lanes)
            largest_at = largest_ptr + sample * SHAPE.blocks + blocks
            block_largest = tl.load(largest_at, mask=blocks < SHAPE.blocks, other=float("-inf"))
            num_listed = write_list(of_list, key_of(block_largest, SHAPE), low)
        tl.store(num_listed_ptr + sample, num_listed)
        high = tl.where(filtered & (top_k > 0), tl.maximum(top_key, low), low)
        goal = top_k.to(tl.float32)
    else:
        num_listed = tl.load(num_listed_ptr + sample)
        low, high, goal = _narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS, WAYS)
        if FIRST:
            high = tl.where(filtered & (top_p < 1.0), tl.maximum(top_key, low), low)
            goal = tl.where(top_k > 0, -1.0, top_p * mass)
        tl.debug_barrier()  # all threads have read what is written now
    tl.store(keys_ptr + 2 * sample, low)
    tl.store(keys_ptr + 2 * sample + 1, high)
    tl.store(goal_ptr + sample, goal)

    pivots = _pivots(low, high, WAYS).to(tl.int32)
    totals = tl.zeros([WAYS], tl.float32)
    for start in range(0, tl.where(high > low, num_listed, 0), TILE.read_blocks):
        x, _ = load_listed(logits_ptr + sample * logits_stride, of_list, start, num_listed, SHAPE, TILE.read_blocks)
        x = tl.ravel(x)
        weights = softmax_weights(x, largest, temperature) if BY_MASS else tl.full(x.shape, 1.0, tl.float32)
        reaches = key_of(x, SHAPE)[None, :] >= pivots[:, None]
        totals += tl.sum(tl.where(reaches, weights[None, :], 0.0), 1)
    tl.store(out, totals)


@triton.jit(do_not_specialize=[*POINTERS, "samples", "first_id"])
def _draw_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    largest_ptr,
    mass_ptr,
    bounds_ptr,
    tallies_ptr,
    keys_ptr,
    goal_ptr,
    list_ptr,
    num_listed_ptr,
    out_ptr,
    samples,
    first_id,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    VOCAB: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    WAYS: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
):
    """(score's bits, id) of the slice's best token."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sample).to(tl.int64)
    if row < 0:
        return
    position, seed, temperature = (
        tl.load(positions_ptr + sample),
        tl.load(seed_ptr + row),
        tl.load(temperature_ptr + row),
    )
    top_k, top_p, min_p, filtered = _load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB)
    greedy = temperature < GREEDY_BELOW
    temperature = tl.where(greedy, 1.0, temperature)
    largest, _, _ = _load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS)
    logits_row = logits_ptr + sample * logits_stride
    first_block = first_id // SHAPE.block

    blocks = tl.arange(0, SHAPE.lanes)
    of_blocks = sample * SHAPE.blocks + blocks
    block_largest = tl.load(largest_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=float("-inf"))
    cutoff = float("-inf")
    if greedy:
        score, block = first_best(block_largest, blocks)
    else:
        if HAS_FILTERS and filtered:
            cutoff = largest + temperature * tl.log(min_p)
            if (top_k > 0) | (top_p < 1.0):
                key, _, _ = _narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS, WAYS)
                cutoff = tl.maximum(smallest_of_key(key, SHAPE), cutoff)
            num_listed = tl.load(num_listed_ptr + sample)
            of_list = list_ptr + sample * SHAPE.blocks
            score, block = draw_listed_block(
                logits_row, of_list, num_listed, cutoff, largest, temperature, seed, position, first_block, SHAPE, TILE
            )
        else:
            block_mass = tl.load(mass_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=0.0)
            scores = (block_largest - largest) / temperature + tl.log(block_mass)
            score, block = first_best(scores + gumbel(seed, position, first_block + blocks, streams.BLOCKS), blocks)

    block = tl.minimum(block, SHAPE.blocks - 1)  # of a row of -inf alone, which has no best block
    x, ids = load_blocks(logits_row, block + tl.zeros((1,), tl.int32), SHAPE)
    x, ids = tl.ravel(x), first_id + tl.ravel(ids)
    noise = tl.where(greedy, 0.0, gumbel(seed, position, ids, streams.TOKENS))
    best, winner = first_best(tl.where(x >= cutoff, (x - largest) / temperature + noise, float("-inf")), ids)
    score = tl.where(best > float("-inf"), score, float("-inf"))
    tl.store(out_ptr + 2 * sample, score.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * sample + 1, tl.where(best > float("-inf"), winner, 0))


@triton.jit(do_not_specialize=["rows_ptr", "positions_ptr", "tokens_ptr", "samples"])
def _choose_kernel(
    draws_ptr,
    rows_ptr,
    positions_ptr,
    out_ptr,
    tokens_ptr,
    tokens_stride,
    samples,
    NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < samples
    row = tl.load(rows_ptr + sample, mask=mask, other=-1).to(tl.int64)
    real = row >= 0
    best, winner = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for rank in tl.static_range(NUM_RANKS):
        draw = draws_ptr + 2 * (rank * samples + sample)
        score = tl.load(draw, mask=real, other=0).to(tl.float32, bitcast=True)
        id = tl.load(draw + 1, mask=real, other=0)
        winner = tl.where(real & (score > best), id, winner)  # of equal scores the first rank's, whose ids are smaller
        best = tl.maximum(best, score)
    tl.store(out_ptr + sample, winner, mask=mask)
    if HAS_TOKENS:
        position = tl.load(positions_ptr + sample, mask=real, other=0)
        tl.store(tokens_ptr + row * tokens_stride + position, winner, mask=real)


def bounds(
    largest: torch.Tensor, mass: torch.Tensor, logits: torch.Tensor, of: Slice, samples: Samples
) -> torch.Tensor:
    """[N, 3] fp32: largest logit, softmax mass and what top-k tokens reach; largest, mass  # [N, B] of the slice's
    blocks, as `summarize_blocks` makes them of logits  # [N, V]."""
    shape = _check(logits, of, samples)
    if not use_triton(logits):
        return _bounds_reference(largest, mass, of, samples)
    out = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    _bounds_kernel[(len(logits),)](
        largest, mass, samples.rows, samples.temperature, samples.top_k, out,
        SHAPE=shape, VOCAB=of.vocab, num_warps=TILE.num_warps,
    )  # fmt: skip
    return out


def tally(
    logits: torch.Tensor,
    of: Slice,
    samples: Samples,
    largest: torch.Tensor,
    all_bounds: torch.Tensor,
    search: Search | None,
    last: torch.Tensor | None,
    *,
    by_mass: bool,
    first: bool,
) -> tuple[Search, torch.Tensor]:
    """The next pass: (state, tally  # [N, W] fp32). all_bounds  # [n, N, 3] and last  # [n, N, W], the tallies before
    this one, are the ranks'; search and last are None in the very first pass, which is by count."""
    shape = _check(logits, of, samples)
    if not use_triton(logits):
        return _tally_reference(logits, of, samples, all_bounds, search, last, by_mass, first)
    count, device = len(logits), logits.device
    if search is None:
        search = Search(
            torch.empty(count, 2, dtype=torch.int64, device=device),
            torch.empty(count, dtype=torch.float32, device=device),
            torch.empty(count, shape.blocks, dtype=torch.int32, device=device),
            torch.empty(count, dtype=torch.int32, device=device),
        )
    out = torch.empty(count, WAYS, dtype=torch.float32, device=device)
    _tally_kernel[(count,)](
        logits, logits.stride(0), samples.rows, samples.temperature, samples.top_k, samples.top_p, samples.min_p,
        largest, all_bounds, last, *search, out, count,
        SHAPE=shape, TILE=TILE, VOCAB=of.vocab, NUM_RANKS=len(all_bounds), WAYS=WAYS, BY_MASS=by_mass, FIRST=first,
        num_warps=TILE.num_warps,
    )  # fmt: skip
    return search, out


def draw(
    logits: torch.Tensor,
    of: Slice,
    samples: Samples,
    largest: torch.Tensor,
    mass: torch.Tensor,
    all_bounds: torch.Tensor,
    search: Search | None,
    last: torch.Tensor | None,
) -> torch.Tensor:
    """[N, 2] int32: the bits of a fp32 score, and the id that has it; search and last: of the last tally, None where
    no row has filters."""
    shape = _check(logits, of, samples)
    if not use_triton(logits):
        return _draw_reference(logits, of, samples, all_bounds, search, last)
    out = torch.empty(len(logits), 2, dtype=torch.int32, device=logits.device)
    _draw_kernel[(len(logits),)](
        logits, logits.stride(0), *samples, largest, mass, all_bounds, last, *(search or (None,) * 4), out,
        len(logits), of.first_id,
        SHAPE=shape, TILE=TILE, VOCAB=of.vocab, NUM_RANKS=len(all_bounds), WAYS=WAYS, HAS_FILTERS=search is not None,
        num_warps=TILE.num_warps,
    )  # fmt: skip
    return out


def choose(draws: torch.Tensor, samples: Samples, tokens: torch.Tensor | None) -> torch.Tensor:
    """Ids  # [N] int32 of the ranks' draws  # [n, N, 2]; with tokens  # [R, max_len], sets tokens[rows, positions]."""
    rows, positions = samples.rows, samples.positions
    if not use_triton(draws):
        return _choose_reference(draws, samples, tokens)
    out = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    _choose_kernel[(triton.cdiv(len(rows), CHOOSE_BLOCK),)](
        draws, rows, positions, out, tokens, tokens.stride(0) if tokens is not None else 0, len(rows),
        NUM_RANKS=len(draws), BLOCK=CHOOSE_BLOCK, HAS_TOKENS=tokens is not None, num_warps=4,
    )  # fmt: skip
    return out


def _check(logits: torch.Tensor, of: Slice, samples: Samples) -> Shape:
    shape = Shape.of(logits, of.num_ids)
    count, tables = len(logits), len(samples.temperature)
    check(of.first_id % shape.block == 0, f"of: first_id {of.first_id} is not the start of a block of {shape.block}")
    check(0 <= of.num_ids <= logits.shape[1], f"of: {of.num_ids} ids, and logits have {logits.shape[1]} columns")
    dtypes = (torch.int32, torch.int32, torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
    for name, x, dtype in zip(Samples._fields, samples, dtypes, strict=True):
        size = count if name in ("rows", "positions") else tables
        check(x.shape == (size,), f"{name}: expected [{size}], got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, x, device=logits.device, dtype=dtype)
    return shape


# -- the same in torch --


class _Asked(NamedTuple):
    """The parameters of each sample  # [N, 1] each."""

    temperature: torch.Tensor  # 1 where greedy
    top_k: torch.Tensor  # 0: off
    top_p: torch.Tensor
    min_p: torch.Tensor
    greedy: torch.Tensor
    filtered: torch.Tensor

    @classmethod
    def of(cls, samples: Samples, vocab: int) -> "_Asked":
        index = samples.rows.long().clamp_min(0)
        tables = (samples.temperature, samples.top_k, samples.top_p, samples.min_p)
        temperature, top_k, top_p, min_p = (table[index][:, None] for table in tables)
        top_k = torch.where(top_k < vocab, top_k.clamp_min(0), 0)
        greedy = temperature < GREEDY_BELOW.value
        filtered = (samples.rows >= 0)[:, None] & ~greedy & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        return cls(torch.where(greedy, 1.0, temperature), top_k, top_p, min_p, greedy, filtered)


def _bounds_reference(largest: torch.Tensor, mass: torch.Tensor, of: Slice, samples: Samples) -> torch.Tensor:
    asked, num_blocks = _Asked.of(samples, of.vocab), largest.shape[1]
    top = largest.amax(1, keepdim=True)
    total = (mass * torch.exp((largest - top.clamp_min(-LARGEST.value)) / asked.temperature)).nansum(1, keepdim=True)
    ordered = largest.sort(1, descending=True).values
    kth = ordered.gather(1, (asked.top_k.long() - 1).clamp(0, num_blocks - 1))
    kth = torch.where((asked.top_k > 0) & (asked.top_k <= num_blocks), kth, -torch.inf)
    return torch.cat((top, total, kth), 1)


def _over_ranks(all_bounds: torch.Tensor, asked: _Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, softmax mass, logit that top-k tokens reach) of each row  # [N, 1] each."""
    each, mass, kth = all_bounds.unbind(2)  # [n, N] each
    each = each.clamp_min(-LARGEST.value)
    largest = each.amax(0)
    total = (mass * torch.exp((each - largest) / asked.temperature.squeeze(1))).sum(0)
    return largest[:, None], total[:, None], kth.amax(0)[:, None]


def _keys(x: torch.Tensor, shift: int) -> torch.Tensor:
    """`key_of` of fp32 x, in int64."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() >> shift


def _smallest(keys: torch.Tensor, shift: int) -> torch.Tensor:
    """`smallest_of_key`."""
    bits = (keys << shift).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def _pivots_reference(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.minimum(low + ((high - low) // WAYS + 1) * torch.arange(WAYS), high)  # [N, W]


def _narrow(search: Search, last: torch.Tensor, asked: _Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(lowest key, highest key, goal) after the last tally  # [N, 1] each."""
    (low, high), goal, totals = search.keys.split(1, 1), search.goal[:, None], last.sum(0)
    goal = torch.where((goal < 0) & (high > low), asked.top_p * totals[:, :1], goal)
    pivots, reached = _pivots_reference(low, high), (totals >= goal) & (high > low)
    lowest = torch.where(reached, pivots, low).amax(1, keepdim=True)
    highest = torch.where(reached | (high <= low), high, pivots - 1).amin(1, keepdim=True)
    return lowest, torch.maximum(highest, lowest), goal


def _tally_reference(
    logits: torch.Tensor,
    of: Slice,
    samples: Samples,
    all_bounds: torch.Tensor,
    search: Search | None,
    last: torch.Tensor | None,
    by_mass: bool,
    first: bool,
) -> tuple[Search, torch.Tensor]:
    asked, shift, x = _Asked.of(samples, of.vocab), UNUSED_BITS[logits.dtype], clean_reference(logits, of.num_ids)
    largest, mass, kth = _over_ranks(all_bounds, asked)
    lowest_key, top_key = (MASKED_KEY.value >> shift) + 1, _keys(largest, shift)
    if search is None or last is None:
        bound = (1 - asked.top_p).clamp_min(0) * mass * (0.999 / of.vocab)
        cutoff = largest + asked.temperature * torch.maximum(bound, asked.min_p).log()
        low = _keys(torch.where(asked.top_k > 0, kth, cutoff), shift).clamp_min(lowest_key)
        high = torch.where(asked.filtered & (asked.top_k > 0), torch.maximum(top_key, low), low)
        goal = asked.top_k.float()
    else:
        low, high, goal = _narrow(search, last, asked)
        if first:
            high = torch.where(asked.filtered & (asked.top_p < 1), torch.maximum(top_key, low), low)
            goal = torch.where(asked.top_k > 0, -1.0, asked.top_p * mass)
    weights = torch.exp((x - largest) / asked.temperature) if by_mass else torch.ones_like(x)
    reached = torch.searchsorted(_pivots_reference(low, high), _keys(x, shift), right=True)  # how many pivots
    of_pivot = torch.zeros(len(x), WAYS + 1, dtype=torch.float64).scatter_add_(1, reached, weights.double())
    totals = of_pivot.flip(1).cumsum(1).flip(1)[:, 1:].float()
    nothing = torch.empty(0, dtype=torch.int32)
    return Search(torch.cat((low, high), 1), goal.squeeze(1), nothing, nothing), totals


def _draw_reference(
    logits: torch.Tensor,
    of: Slice,
    samples: Samples,
    all_bounds: torch.Tensor,
    search: Search | None,
    last: torch.Tensor | None,
) -> torch.Tensor:
    asked, shift, x = _Asked.of(samples, of.vocab), UNUSED_BITS[logits.dtype], clean_reference(logits, of.num_ids)
    largest, _, _ = _over_ranks(all_bounds, asked)
    cutoff = torch.full_like(largest, -torch.inf)
    if search is not None and last is not None:
        key, _, _ = _narrow(search, last, asked)
        searched = (asked.top_k > 0) | (asked.top_p < 1)
        threshold = torch.where(searched, _smallest(key, shift), -torch.inf)
        min_p_cutoff = largest + asked.temperature * asked.min_p.log()
        cutoff = torch.where(asked.filtered, torch.maximum(threshold, min_p_cutoff), cutoff)
    scores = blocks_reference(torch.where(x >= cutoff, (x - largest) / asked.temperature, -torch.inf))
    _, num_blocks, block_size = scores.shape
    seed, places = samples.seed[samples.rows.long().clamp_min(0)], torch.arange(len(x))
    numbers = of.first_id // block_size + torch.arange(num_blocks)
    of_blocks = scores.logsumexp(2) + gumbel_reference(seed, samples.positions, numbers, streams.BLOCKS)
    score, block = of_blocks.max(1)
    ids = of.first_id + block[:, None] * block_size + torch.arange(block_size)
    noisy = scores[places, block] + gumbel_reference(seed, samples.positions, ids, streams.TOKENS)
    drawn = ids.gather(1, noisy.argmax(1, keepdim=True)).squeeze(1)
    best, best_id = x.max(1)
    greedy = asked.greedy.squeeze(1)
    score = torch.where(greedy, best, score)
    drawn = torch.where(greedy, of.first_id + best_id, drawn)
    return torch.stack((score.view(torch.int32), drawn.int()), 1)


def _choose_reference(draws: torch.Tensor, samples: Samples, tokens: torch.Tensor | None) -> torch.Tensor:
    scores, ids = draws[..., 0].contiguous().view(torch.float32), draws[..., 1]
    best, rank = scores.max(0)  # of equal ones the first rank's
    winner = ids.gather(0, rank[None]).squeeze(0)
    real = samples.rows >= 0
    out = torch.where(real & (best > -torch.inf), winner, 0)
    if tokens is not None:
        tokens[samples.rows[real].long(), samples.positions[real].long()] = out[real]
    return out
