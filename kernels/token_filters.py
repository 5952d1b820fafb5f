"""Which tokens top-k, top-p and min-p keep, and a draw among them; `sampling` calls it for rows that have filters.

Filters apply in the order top-k, top-p (on what top-k left, renormalised), min-p, as transformers' warpers do; tokens
tied with the last kept one are all kept. So a filter is a threshold on the logits. It is found without sorting, by a
search over integer keys that order as the floats do, among the blocks that reach a floor: at first 64 blocks at most.
A threshold at or above the floor is exact (always for top_k <= 32, unless block maxima tie); if it is not, a lower
floor lists 1,024 blocks, and then all that can matter. What is kept depends on nothing but the row.

Knows the logits of one row and its filters; knows nothing of batches and tables.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels import gumbel as streams
from minisgl.kernels.gumbel import gumbel
from minisgl.kernels.vocab_blocks import (
    MASKED_KEY,
    first_best,
    floor_of_list,
    key_of,
    load_listed,
    smallest_of_key,
    softmax_weights,
    write_list,
)


class Tile(NamedTuple):
    """How a row's program cuts its work; no field changes what is kept."""

    num_warps: int = 8  # 256 rows, top-k 20 and top-p: 54 us on an H200, 71 with 16, of which one fits a processor
    read_blocks: int = 64  # at once: 16 logits a thread
    first_list: int = 64  # blocks listed at first
    list_growth: int = 16  # how many times more are listed next
    ways: int = 8  # pivots a pass of the search: three passes find one of 512 keys, the width of a nucleus in bf16


TILE = Tile()


def kept_reference(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The tokens that the filters keep; logits  # [N, V] fp32, the rest  # [N]; returns [N, V] bool."""
    vocab = logits.shape[1]
    top = logits.amax(-1, keepdim=True)
    kept = logits >= top + temperature[:, None] * torch.log(min_p)[:, None]
    if bool(((top_k > 0) & (top_k < vocab)).any()) or bool((top_p < 1).any()):
        ordered = logits.sort(dim=-1, descending=True).values
        last = torch.where(top_k > 0, top_k, vocab).clamp_max(vocab).long()[:, None] - 1
        kth = ordered.gather(1, last)
        mass = torch.exp((ordered - top) / temperature[:, None]).masked_fill_(ordered < kth, 0).double()
        mass_above = mass.cumsum(-1) - mass
        in_nucleus = (mass_above < top_p[:, None] * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        nucleus_end = ordered.gather(1, (in_nucleus - 1).clamp_min(0))
        kept &= (logits >= kth) & ((logits >= nucleus_end) | (top_p >= 1)[:, None])
    return kept


@triton.jit
def _threshold(
    logits_row,
    list_ptr,
    num_listed,
    floor,
    holds_all,
    largest,
    temperature,
    mass,
    top_k,
    top_p,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The key that top-k and then top-p keep logits from, or floor - 1 if it is below the floor of the list.

    `mass` is the row's softmax mass. Each search asks for the largest key such that the weights of the keys from it on
    reach a target. The first pivot of a pass is the lower end: after top-k, its mass is what top-k left.
    """
    key = floor - 1
    for BY_MASS in tl.static_range(2):
        if BY_MASS:
            searches = (top_p < 1.0) & ((top_k == 0) | (key >= floor) | holds_all)
            mass = tl.where(top_k > 0, -1.0, mass)
        else:
            searches = top_k > 0
        high = tl.where(searches, key_of(largest, SHAPE).to(tl.int64), key)
        while key < high:
            step = (high - key) // TILE.ways + 1
            pivots = tl.minimum(key + step * tl.arange(0, TILE.ways), high)
            totals = tl.zeros_like(pivots).to(tl.float32)
            for start in range(0, num_listed, TILE.read_blocks):
                x, _ = load_listed(logits_row, list_ptr, start, num_listed, SHAPE, TILE.read_blocks)
                x = tl.ravel(x)
                weights = softmax_weights(x, largest, temperature) if BY_MASS else tl.full(x.shape, 1.0, tl.float32)
                reaches = key_of(x, SHAPE)[None, :] >= pivots.to(tl.int32)[:, None]
                totals += tl.sum(tl.where(reaches, weights[None, :], 0.0), 1)
            if BY_MASS:
                mass = tl.where(mass < 0.0, tl.max(totals, 0), mass)
                reached = totals >= top_p * mass
            else:
                reached = totals >= top_k.to(tl.float32)
            key = tl.max(tl.where(reached, pivots, key), 0)
            high = tl.min(tl.where(reached, high, pivots - 1), 0)
    return key


@triton.jit
def draw_kept_block(
    logits_row,
    list_ptr,
    block_largest,
    block_mass,
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """(a block drawn by the mass of its kept tokens, the smallest logit that is kept)."""
    LOWEST_KEY: tl.constexpr = (MASKED_KEY >> SHAPE.shift) + 1
    keys = key_of(block_largest, SHAPE)
    mass = tl.sum(block_mass * softmax_weights(block_largest, largest, temperature), 0)
    min_p_cutoff = largest + temperature * tl.log(min_p)
    min_p_key = key_of(min_p_cutoff, SHAPE)
    # Tokens below this weigh less than 1 - top_p together; 0.999 leaves room for rounding.
    top_p_cutoff = largest + temperature * tl.log(tl.maximum(1.0 - top_p, 0.0) * mass * (0.999 / SHAPE.vocab))
    lowest_floor = tl.where(top_k > 0, LOWEST_KEY, tl.maximum(min_p_key, key_of(top_p_cutoff, SHAPE)))
    lowest_floor = tl.maximum(lowest_floor, LOWEST_KEY).to(tl.int64)

    limit = tl.where(top_k <= TILE.first_list, TILE.first_list, TILE.first_list * TILE.list_growth)
    key = lowest_floor
    num_listed = 0
    complete = False
    while not complete:
        floor = floor_of_list(keys, tl.minimum(tl.maximum(top_k, limit // 2), limit), limit, lowest_floor)
        holds_all = floor == lowest_floor
        num_listed = write_list(list_ptr, keys, floor)
        key = _threshold(
            logits_row, list_ptr, num_listed, floor, holds_all, largest, temperature, mass, top_k, top_p, SHAPE, TILE
        )
        complete = holds_all | (key >= floor) | ((top_k == 0) & (min_p_key >= floor))
        limit *= TILE.list_growth

    cutoff = tl.maximum(smallest_of_key(key, SHAPE), min_p_cutoff)
    _, block = draw_listed_block(
        logits_row, list_ptr, num_listed, cutoff, largest, temperature, seed, position, 0, SHAPE, TILE
    )
    return block, cutoff


@triton.jit
def draw_listed_block(
    logits_row,
    list_ptr,
    num_listed,
    cutoff,
    largest,
    temperature,
    seed,
    position,
    first_block,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """(its score, a listed block drawn by the mass of its tokens from `cutoff` on); first_block: number of block 0."""
    best = float("-inf")
    block = 0
    for start in range(0, num_listed, TILE.read_blocks):
        x, ids = load_listed(logits_row, list_ptr, start, num_listed, SHAPE, TILE.read_blocks)
        numbers = tl.min(ids, 1) // SHAPE.block
        kept_mass = tl.sum(tl.where(x >= cutoff, softmax_weights(x, largest, temperature), 0.0), 1)
        noise = gumbel(seed, position, first_block + numbers, streams.BLOCKS)
        score, first = first_best(tl.log(kept_mass) + noise, numbers)
        block = tl.where(score > best, first, block)
        best = tl.maximum(best, score)
    return best, block
