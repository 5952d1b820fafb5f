"""Sampling where each rank has the logits of a slice of the vocabulary: `sampling`'s draw, in steps that ranks join.

    bounds    of each row: the slice's largest logit, its softmax mass, and a logit that k of its tokens reach
    tally     how many tokens of the slice, or what mass of them, reach each of 64 pivots     sharded_thresholds.py
    draw      the slice's best block by score, and the token drawn of it                      sharded_draws.py
    choose    the best of the ranks' draws                                                    sharded_draws.py

After each of the first three the ranks gather what all have found, and the next step reads that: 12, 256 and 8 bytes a
row and rank. Every rank computes each decision from the same gathered numbers, so all come to the same token.

Here are the first step and what the steps have in common.

Legend: N samples, n ranks, V ids of the slice, B blocks of it, R rows of the parameter tables.
Bound by memory as `sampling` is, with V / n ids a rank; then by the exchanges.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import check, check_same, use_triton
from minisgl.kernels.token_filters import TILE
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    LARGEST,
    MASKED_KEY,
    Shape,
    key_of,
    smallest_of_key,
    softmax_weights,
)

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


@triton.jit
def load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB: tl.constexpr):
    """(top-k, 0: off; top-p; min-p; whether any of them is on) of a row."""
    top_k = tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < VOCAB, tl.maximum(top_k, 0), 0)
    filtered = (temperature >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return top_k, top_p, min_p, filtered


@triton.jit
def load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS: tl.constexpr):
    """(largest logit, softmax mass, logit that top-k tokens reach) of a row, over all ranks."""
    ranks = tl.arange(0, triton.next_power_of_2(NUM_RANKS))
    of_rank = bounds_ptr + (ranks * samples + sample) * 3
    mask = ranks < NUM_RANKS
    largest_each = tl.maximum(tl.load(of_rank, mask=mask, other=float("-inf")), -LARGEST)
    mass_each = tl.load(of_rank + 1, mask=mask, other=0.0)
    largest = tl.max(largest_each, 0)
    mass = tl.sum(mass_each * softmax_weights(largest_each, largest, temperature), 0)
    return largest, mass, tl.max(tl.load(of_rank + 2, mask=mask, other=float("-inf")), 0)


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


def bounds(
    largest: torch.Tensor, mass: torch.Tensor, logits: torch.Tensor, of: Slice, samples: Samples
) -> torch.Tensor:
    """[N, 3] fp32: largest logit, softmax mass and what top-k tokens reach; largest, mass  # [N, B] of the slice's
    blocks, as `summarize_blocks` makes them of logits  # [N, V]."""
    shape = check_slice(logits, of, samples)
    if not use_triton(logits):
        return _bounds_reference(largest, mass, of, samples)
    out = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    _bounds_kernel[(len(logits),)](
        largest, mass, samples.rows, samples.temperature, samples.top_k, out,
        SHAPE=shape, VOCAB=of.vocab, num_warps=TILE.num_warps,
    )  # fmt: skip
    return out


def check_slice(logits: torch.Tensor, of: Slice, samples: Samples) -> Shape:
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


class Asked(NamedTuple):
    """The parameters of each sample  # [N, 1] each."""

    temperature: torch.Tensor  # 1 where greedy
    top_k: torch.Tensor  # 0: off
    top_p: torch.Tensor
    min_p: torch.Tensor
    greedy: torch.Tensor
    filtered: torch.Tensor

    @classmethod
    def of(cls, samples: Samples, vocab: int) -> "Asked":
        index = samples.rows.long().clamp_min(0)
        tables = (samples.temperature, samples.top_k, samples.top_p, samples.min_p)
        temperature, top_k, top_p, min_p = (table[index][:, None] for table in tables)
        top_k = torch.where(top_k < vocab, top_k.clamp_min(0), 0)
        greedy = temperature < GREEDY_BELOW.value
        filtered = (samples.rows >= 0)[:, None] & ~greedy & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        return cls(torch.where(greedy, 1.0, temperature), top_k, top_p, min_p, greedy, filtered)


def _bounds_reference(largest: torch.Tensor, mass: torch.Tensor, of: Slice, samples: Samples) -> torch.Tensor:
    asked, num_blocks = Asked.of(samples, of.vocab), largest.shape[1]
    top = largest.amax(1, keepdim=True)
    total = (mass * torch.exp((largest - top.clamp_min(-LARGEST.value)) / asked.temperature)).nansum(1, keepdim=True)
    ordered = largest.sort(1, descending=True).values
    kth = ordered.gather(1, (asked.top_k.long() - 1).clamp(0, num_blocks - 1))
    kth = torch.where((asked.top_k > 0) & (asked.top_k <= num_blocks), kth, -torch.inf)
    return torch.cat((top, total, kth), 1)


def over_ranks_reference(all_bounds: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, softmax mass, logit that top-k tokens reach) of each row  # [N, 1] each."""
    each, mass, kth = all_bounds.unbind(2)  # [n, N] each
    each = each.clamp_min(-LARGEST.value)
    largest = each.amax(0)
    total = (mass * torch.exp((each - largest) / asked.temperature.squeeze(1))).sum(0)
    return largest[:, None], total[:, None], kth.amax(0)[:, None]
