"""Sample one token id a row: greedy, or by two draws among the tokens that top-k, top-p and min-p keep.

    block = argmax over blocks of 64 ids: logsumexp(kept logits / temperature) + gumbel(seed, position, block)
    id    = argmax over the block's kept tokens: logit / temperature + gumbel(seed, position, token)

Each is a Gumbel-max draw, so the id has the distribution of the softmax. Filters apply in the order top-k, top-p (on
what top-k left, renormalised), min-p, as transformers' warpers do; tokens tied with the last kept one are all kept.
Ties of a score go to the smallest id, as in torch.argmax.

Legend: N samples, V vocabulary, B blocks, R rows of the parameter tables. logits  # [N, V].
Bound by memory: reads [N, V] once.

Two launches: `vocab_blocks.summarize_blocks`, and one with a program a row. Without filters a block is drawn from the
summaries alone. A filter is a threshold on the logits, found without sorting by a search over integer keys that order
as the floats do, among the blocks that reach a floor: at first 64 blocks at most. A threshold at or above the floor is
exact (always for top_k <= 32, unless block maxima tie); if it is not, a lower floor lists 1,024, and then all that can
matter. So a row's id depends on nothing but that row.

A row of -1 is padding of a captured step: its id is 0 and no table is touched.

NaN logits count as -inf, +inf as the largest float. A -inf logit is sampled only when all are; then the id is 0.
Source: Maddison et al., "A* sampling", 2014 (Gumbel-max).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minisgl.kernels import gumbel as streams
from minisgl.kernels.gumbel import gumbel, gumbel_reference
from minisgl.kernels.launch import check, check_same, use_triton
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    LARGEST,
    MASKED_KEY,
    Shape,
    blocks_reference,
    clean_reference,
    first_best,
    floor_of_list,
    key_of,
    load_blocks,
    load_listed,
    smallest_of_key,
    softmax_weights,
    summarize_blocks,
    write_list,
)

# Read one value at a time, and possibly slices of any alignment: they must not compile a kernel each.
NARROW_POINTERS = ["rows_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr"]


@dataclass(frozen=True)
class Tile:
    """How a row's program cuts its work; no field changes what is kept."""

    num_warps: int = 16
    read_blocks: int = 64  # at once: 8 logits a thread
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


def draw_reference(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
) -> torch.Tensor:
    """Ids  # [N] of rows that are not greedy; logits  # [N, V] fp32, the rest  # [N]."""
    vocab = logits.shape[1]
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    some = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    if bool(some.any()):  # the others do not pay for sorting
        kept = kept_reference(logits[some], temperature[some], top_k[some], top_p[some], min_p[some])
        scores[some] = scores[some].masked_fill(~kept, -torch.inf)
    scores = blocks_reference(scores)
    _, num_blocks, block_size = scores.shape
    numbers = torch.arange(max(num_blocks, block_size), device=logits.device)
    noise = gumbel_reference(seed, positions, numbers[:num_blocks], streams.BLOCKS)
    block = (scores.logsumexp(-1) + noise).argmax(-1)
    ids = block[:, None] * block_size + numbers[:block_size]
    noise = gumbel_reference(seed, positions, ids, streams.TOKENS)
    of_block = scores[torch.arange(len(scores), device=logits.device), block]
    return ids.gather(1, (of_block + noise).argmax(-1, keepdim=True)).squeeze(1)


def sample_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in torch; see `sample`."""
    real = rows >= 0
    index = rows.long().clamp_min(0)
    wide = clean_reference(logits)
    ids = wide.argmax(-1)
    random = real & (temperature[index] >= GREEDY_BELOW.value) & (wide.amax(-1) > -torch.inf)
    if bool(random.any()):
        parameters = [table[index[random]] for table in (temperature, top_k, top_p, min_p, seed)]
        ids[random] = draw_reference(wide[random], positions[random], *parameters)
    out = ids.int() * real
    if tokens is not None:
        tokens[rows[real].long(), positions[real].long()] = out[real]
    return out


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
def _draw_kept_block(
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
    best = float("-inf")
    block = 0
    for start in range(0, num_listed, TILE.read_blocks):
        x, ids = load_listed(logits_row, list_ptr, start, num_listed, SHAPE, TILE.read_blocks)
        numbers = tl.min(ids, 1) // SHAPE.block
        kept_mass = tl.sum(tl.where(x >= cutoff, softmax_weights(x, largest, temperature), 0.0), 1)
        score, first = first_best(tl.log(kept_mass) + gumbel(seed, position, numbers, streams.BLOCKS), numbers)
        block = tl.where(score > best, first, block)
        best = tl.maximum(best, score)
    return block, cutoff


@triton.jit(do_not_specialize=[*NARROW_POINTERS, "tokens_ptr"])
def _sample_rows_kernel(
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
    list_ptr,
    out_ptr,
    tokens_ptr,
    tokens_stride,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
):
    """Choose a block, by the summaries or among the kept tokens, and then a token of it."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sample).to(tl.int64)
    if row < 0:
        tl.store(out_ptr + sample, 0)
        return
    position, seed = tl.load(positions_ptr + sample), tl.load(seed_ptr + row)
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.where(top_k < SHAPE.vocab, tl.maximum(top_k, 0), 0)
    greedy = temperature < GREEDY_BELOW
    temperature = tl.where(greedy, 1.0, temperature)
    logits_row = logits_ptr + sample * logits_stride

    blocks = tl.arange(0, SHAPE.lanes)
    of_blocks = sample * SHAPE.blocks + blocks
    block_largest = tl.load(largest_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=float("-inf"))
    largest = tl.maximum(tl.max(block_largest, 0), -LARGEST)
    cutoff = float("-inf")
    if greedy:
        _, block = first_best(block_largest, blocks)
    else:
        block_mass = tl.load(mass_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=0.0)
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            block, cutoff = _draw_kept_block(
                logits_row,
                list_ptr + sample * SHAPE.blocks,
                block_largest,
                block_mass,
                largest,
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                position,
                SHAPE,
                TILE,
            )
        else:
            scores = (block_largest - largest) / temperature + tl.log(block_mass)
            _, block = first_best(scores + gumbel(seed, position, blocks, streams.BLOCKS), blocks)

    block = tl.minimum(block, SHAPE.blocks - 1)  # of a row of -inf alone, which has no best block
    x, ids = load_blocks(logits_row, block + tl.zeros((1,), tl.int32), SHAPE)
    x, ids = tl.ravel(x), tl.ravel(ids)
    noise = tl.where(greedy, 0.0, gumbel(seed, position, ids, streams.TOKENS))
    best, winner = first_best(tl.where(x >= cutoff, (x - largest) / temperature + noise, float("-inf")), ids)
    winner = tl.where(best > float("-inf"), winner, 0)
    tl.store(out_ptr + sample, winner)
    if HAS_TOKENS:
        tl.store(tokens_ptr + row * tokens_stride + position, winner)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample ids  # [N] int32; with `tokens`, also set tokens[rows[n], positions[n]] = ids[n].

    logits     # [N, V] fp32, bf16 or fp16; rows may be strided
    rows       # [N] int32, row of the parameter tables; -1: padding
    positions  # [N] int32, place of the sampled token in its text
    temperature, top_p, min_p  # [R] fp32; below 1e-5 (greedy), 1 or more, 0 or less: off
    top_k      # [R] int32; 0 or at least V: off
    seed       # [R] int64
    tokens     # [R, max_len] int32

    Rows and positions must be inside their tables (not checked: it would synchronise).
    Raises ValueError for a wrong shape, stride, dtype or device.
    """
    shape = Shape.of(logits)
    samples = len(logits)
    for name, x in (("rows", rows), ("positions", positions)):
        check(x.shape == (samples,), f"{name}: expected [{samples}], got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, x, device=logits.device, dtype=torch.int32)
    tables = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64),
    )
    for name, x, dtype in tables:
        check(x.shape == (len(temperature),), f"{name}: expected [{len(temperature)}], got {list(x.shape)}")
        check(x.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, x, device=logits.device, dtype=dtype)
    if tokens is not None:
        check(
            tokens.dim() == 2 and len(tokens) == len(temperature),
            f"tokens: expected [{len(temperature)}, max_len], got {list(tokens.shape)}",
        )
        check(tokens.stride(-1) == 1, "tokens: last dimension must be contiguous")
        check_same("tokens", tokens, device=logits.device, dtype=torch.int32)
    if not use_triton(logits):
        return sample_reference(logits, rows, positions, temperature, top_k, top_p, min_p, seed, tokens)

    ids = torch.empty(samples, dtype=torch.int32, device=logits.device)
    if samples == 0:
        return ids
    largest, mass = summarize_blocks(logits, rows, temperature)
    listed = torch.empty_like(largest, dtype=torch.int32)
    _sample_rows_kernel[(samples,)](
        logits,
        logits.stride(0),
        rows,
        positions,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        largest,
        mass,
        listed,
        ids,
        tokens,
        tokens.stride(0) if tokens is not None else 0,
        SHAPE=shape,
        TILE=TILE,
        HAS_TOKENS=tokens is not None,
        num_warps=TILE.num_warps,
    )
    return ids
