"""Sample one token id a row: greedy, or by two draws among the tokens that top-k, top-p and min-p keep.

    block = argmax over blocks of 64 ids: logsumexp(kept logits / temperature) + gumbel(seed, position, block)
    id    = argmax over the block's kept tokens: logit / temperature + gumbel(seed, position, token)

Each is a Gumbel-max draw, so the id has the distribution of the softmax. Ties of a score go to the smallest id, as in
torch.argmax.

Legend: N samples, V vocabulary, B blocks, R rows of the parameter tables. logits  # [N, V].
Bound by memory: reads [N, V] once.

Two launches: `vocab_blocks.summarize_blocks`, and one with a program a row. Without filters a block is drawn from the
summaries alone; with them, `token_filters` looks for the kept tokens in few blocks. A row's id depends on nothing but
that row.

A row of -1 is padding of a captured step: its id is 0 and no table is touched.

NaN logits count as -inf, +inf as the largest float. A -inf logit is never sampled: when all are, the id is -1, and the
token that is written is 0, which a step that runs already may read.
Source: Maddison et al., "A* sampling", 2014 (Gumbel-max).
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels import gumbel as streams
from minisgl.kernels.gumbel import gumbel, gumbel_reference
from minisgl.kernels.launch import check, check_same, use_triton
from minisgl.kernels.token_filters import Tile, draw_kept_block, kept_reference
from minisgl.kernels.vocab_blocks import (
    GREEDY_BELOW,
    LARGEST,
    Shape,
    blocks_reference,
    clean_reference,
    first_best,
    load_blocks,
    summarize_blocks,
)

TILE = Tile()
# Blocks at a time: with all at once the kernel's code, which every step fetches anew, is a quarter longer.
DRAWN_BLOCKS = tl.constexpr(512)
# Read one value at a time, and possibly slices of any alignment: they must not compile a kernel each.
NARROW_POINTERS = ["rows_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr"]


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
    ids, some = wide.argmax(-1), wide.amax(-1) > -torch.inf
    random = real & (temperature[index] >= GREEDY_BELOW.value) & some
    if bool(random.any()):
        parameters = [table[index[random]] for table in (temperature, top_k, top_p, min_p, seed)]
        ids[random] = draw_reference(wide[random], positions[random], *parameters)
    out = ids.int() * real
    if tokens is not None:
        tokens[rows[real].long(), positions[real].long()] = out[real]
    return out.where(some | ~real, -1)


@triton.jit
def _draw_block(largest_ptr, mass_ptr, largest, temperature, seed, position, SHAPE: tl.constexpr):
    """The block that the summaries at largest_ptr and mass_ptr  # [B] give, without filters."""
    lanes = tl.arange(0, DRAWN_BLOCKS)
    best = tl.full([DRAWN_BLOCKS], float("-inf"), tl.float32)
    block = lanes
    for start in range(0, SHAPE.blocks, DRAWN_BLOCKS):
        blocks = start + lanes
        mask = blocks < SHAPE.blocks
        weight = (tl.load(largest_ptr + blocks, mask=mask, other=float("-inf")) - largest) / temperature
        weight += tl.log(tl.load(mass_ptr + blocks, mask=mask, other=0.0))
        score = weight + gumbel(seed, position, blocks, streams.BLOCKS)
        block = tl.where(score > best, blocks, block)
        best = tl.maximum(best, score)
    _, block = first_best(best, block)
    return block


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
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            block_mass = tl.load(mass_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=0.0)
            block, cutoff = draw_kept_block(
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
            of_sample = sample * SHAPE.blocks
            block = _draw_block(
                largest_ptr + of_sample, mass_ptr + of_sample, largest, temperature, seed, position, SHAPE
            )

    block = tl.minimum(block, SHAPE.blocks - 1)  # of a row of -inf alone, which has no best block
    x, ids = load_blocks(logits_row, block + tl.zeros((1,), tl.int32), SHAPE)
    x, ids = tl.ravel(x), tl.ravel(ids)
    noise = tl.where(greedy, 0.0, gumbel(seed, position, ids, streams.TOKENS))
    best, winner = first_best(tl.where(x >= cutoff, (x - largest) / temperature + noise, float("-inf")), ids)
    found = best > float("-inf")
    tl.store(out_ptr + sample, tl.where(found, winner, -1))
    if HAS_TOKENS:
        tl.store(tokens_ptr + row * tokens_stride + position, tl.where(found, winner, 0))


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
    """Sample ids  # [N] int32, -1 where no logit is finite; with `tokens`, also set tokens[rows[n], positions[n]] =
    ids[n], or 0.

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
