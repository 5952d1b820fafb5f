"""Tokens drawn where each rank has the logits of a slice of the vocabulary; see sharded_bounds.py.

    draw      the slice's best block by score, and the token drawn of it
    choose    the best of the ranks' draws

Scores are those of `sampling`, bit for bit, since noise depends on the numbers of tokens and blocks in the whole
vocabulary, and slices are whole blocks.

Legend: N samples, n ranks, V ids of the slice, B blocks of it, R rows of the parameter tables, W pivots.
Bound by memory: reads the blocks that can matter, or one where a row has no filters.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels import gumbel as streams
from minisgl.kernels.gumbel import gumbel, gumbel_reference
from minisgl.kernels.launch import cdiv, use_triton
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
from minisgl.kernels.sharded_thresholds import WAYS, Search, narrow_reference, narrowed, smallest_reference
from minisgl.kernels.token_filters import TILE, draw_listed_block
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    UNUSED_BITS,
    blocks_reference,
    clean_reference,
    first_best,
    load_blocks,
    smallest_of_key,
)

CHOOSE_BLOCK = 128  # samples a program


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
    top_k, top_p, min_p, filtered = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, temperature, VOCAB)
    greedy = temperature < GREEDY_BELOW
    temperature = tl.where(greedy, 1.0, temperature)
    largest, _, _ = load_bounds(bounds_ptr, sample, samples, temperature, NUM_RANKS)
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
                key, _, _ = narrowed(keys_ptr, goal_ptr, tallies_ptr, top_p, sample, samples, NUM_RANKS, WAYS)
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
    best, winner = tl.full([BLOCK], float("-inf"), tl.float32), tl.where(real, -1, 0)
    for rank in tl.static_range(NUM_RANKS):
        draw = draws_ptr + 2 * (rank * samples + sample)
        score = tl.load(draw, mask=real, other=0).to(tl.float32, bitcast=True)
        id = tl.load(draw + 1, mask=real, other=0)
        winner = tl.where(real & (score > best), id, winner)  # of equal scores the first rank's, whose ids are smaller
        best = tl.maximum(best, score)
    tl.store(out_ptr + sample, winner, mask=mask)
    if HAS_TOKENS:
        position = tl.load(positions_ptr + sample, mask=real, other=0)
        tl.store(tokens_ptr + row * tokens_stride + position, tl.maximum(winner, 0), mask=real)


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
    shape = check_slice(logits, of, samples)
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
    """Ids  # [N] int32 of the ranks' draws  # [n, N, 2], -1 where no rank has one; with tokens  # [R, max_len], sets
    tokens[rows, positions], then to 0."""
    rows, positions = samples.rows, samples.positions
    if not use_triton(draws):
        return _choose_reference(draws, samples, tokens)
    out = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    _choose_kernel[(cdiv(len(rows), CHOOSE_BLOCK),)](
        draws, rows, positions, out, tokens, tokens.stride(0) if tokens is not None else 0, len(rows),
        NUM_RANKS=len(draws), BLOCK=CHOOSE_BLOCK, HAS_TOKENS=tokens is not None, num_warps=4,
    )  # fmt: skip
    return out


# -- the same in torch --


def _draw_reference(
    logits: torch.Tensor,
    of: Slice,
    samples: Samples,
    all_bounds: torch.Tensor,
    search: Search | None,
    last: torch.Tensor | None,
) -> torch.Tensor:
    asked, shift, x = Asked.of(samples, of.vocab), UNUSED_BITS[logits.dtype], clean_reference(logits, of.num_ids)
    largest, _, _ = over_ranks_reference(all_bounds, asked)
    cutoff = torch.full_like(largest, -torch.inf)
    if search is not None and last is not None:
        key, _, _ = narrow_reference(search, last, asked)
        searched = (asked.top_k > 0) | (asked.top_p < 1)
        threshold = torch.where(searched, smallest_reference(key, shift), -torch.inf)
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
    out = torch.where(best > -torch.inf, winner, -1).where(real, 0)
    if tokens is not None:
        tokens[samples.rows[real].long(), samples.positions[real].long()] = out[real].clamp_min(0)
    return out
