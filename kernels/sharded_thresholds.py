"""Thresholds that top-k and then top-p keep logits from, where each rank has a slice of them; see sharded_bounds.py.

    tally     how many tokens of the slice, or what mass of them, reach each of 64 pivots

Tallies narrow the range of the threshold 64 ways a pass: in bf16 three passes by count and three by mass, six each in
fp32. Their number is fixed, so that a graph can hold them; where no row has filters they are left out. A threshold may
differ from that of `sampling` in the last place, as masses are added in another order.

Legend: N samples, n ranks, V ids of the slice, B blocks of it, W pivots.
Bound by memory: reads the blocks that can matter once a pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import use_triton
from minisgl.kernels.sharded_bounds import (
    POINTERS,
    Asked,
    Samples,
    Slice,
    check_slice,
    load_bounds,
    load_filters,
    over_ranks_reference,
)
from minisgl.kernels.token_filters import TILE
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    MASKED_KEY,
    UNUSED_BITS,
    clean_reference,
    key_of,
    load_listed,
    softmax_weights,
    write_list,
)

WAYS = 64  # pivots a pass: 64 x 4,096 logits are compared at once, as long as an exchange takes


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
def _pivots(low, high, WAYS: tl.constexpr):
    return tl.minimum(low + ((high - low) // WAYS + 1) * tl.arange(0, WAYS), high)


@triton.jit
def narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS: tl.constexpr, WAYS: tl.constexpr):
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
    top_k, top_p, min_p, filtered = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB)
    temperature = tl.where(temperature < GREEDY_BELOW, 1.0, temperature)
    largest, mass, kth = load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS)
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
        low, high, goal = narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS, WAYS)
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
    shape = check_slice(logits, of, samples)
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


# -- the same in torch --


def _keys(x: torch.Tensor, shift: int) -> torch.Tensor:
    """`key_of` of fp32 x, in int64."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() >> shift


def smallest_reference(keys: torch.Tensor, shift: int) -> torch.Tensor:
    """`smallest_of_key`."""
    bits = (keys << shift).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def _pivots_reference(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.minimum(low + ((high - low) // WAYS + 1) * torch.arange(WAYS), high)  # [N, W]


def narrow_reference(
    search: Search, last: torch.Tensor, asked: Asked
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    asked, shift, x = Asked.of(samples, of.vocab), UNUSED_BITS[logits.dtype], clean_reference(logits, of.num_ids)
    largest, mass, kth = over_ranks_reference(all_bounds, asked)
    lowest_key, top_key = (MASKED_KEY.value >> shift) + 1, _keys(largest, shift)
    if search is None or last is None:
        bound = (1 - asked.top_p).clamp_min(0) * mass * (0.999 / of.vocab)
        cutoff = largest + asked.temperature * torch.maximum(bound, asked.min_p).log()
        low = _keys(torch.where(asked.top_k > 0, kth, cutoff), shift).clamp_min(lowest_key)
        high = torch.where(asked.filtered & (asked.top_k > 0), torch.maximum(top_key, low), low)
        goal = asked.top_k.float()
    else:
        low, high, goal = narrow_reference(search, last, asked)
        if first:
            high = torch.where(asked.filtered & (asked.top_p < 1), torch.maximum(top_key, low), low)
            goal = torch.where(asked.top_k > 0, -1.0, asked.top_p * mass)
    weights = torch.exp((x - largest) / asked.temperature) if by_mass else torch.ones_like(x)
    reached = torch.searchsorted(_pivots_reference(low, high), _keys(x, shift), right=True)  # how many pivots
    of_pivot = torch.zeros(len(x), WAYS + 1, dtype=torch.float64).scatter_add_(1, reached, weights.double())
    totals = of_pivot.flip(1).cumsum(1).flip(1)[:, 1:].float()
    nothing = torch.empty(0, dtype=torch.int32)
    return Search(torch.cat((low, high), 1), goal.squeeze(1), nothing, nothing), totals
