"""Sample one token id a row: greedy, or Gumbel-max over the tokens that top-k, top-p and min-p keep.

    id = argmax over kept tokens of logit / temperature + gumbel(seed, position, token)

Without filters the same is done twice, which gives the same distribution for far less noise: among the blocks of 4096
token ids, each with the log-sum-exp of its logits and one draw, and then among the tokens of the block that won.

Filters apply in the order top-k, top-p (on what top-k left, renormalised), min-p, as transformers' warpers do; tokens
tied with the last kept one are all kept. Each filter is a threshold on the logits, found without sorting: by bisection
over integer keys that order as the floats do. Ties of the score go to the smallest id, as in torch.argmax.

Legend: N samples, V vocabulary, R rows of the parameter tables, C candidates. logits  # [N, V].
Bound by memory: reads [N, V] once.

Two launches. The first takes blocks of 4096 token ids: it leaves the block's score without filters; with filters, its
largest logits, at most C, and its softmax mass. The second takes rows: it samples in the best block, or searches the
thresholds among the candidates, which is exact when every kept token is one of them (always for top_k <= C / 2, unless
more than C / 2 logits of a block tie). It checks that, and else searches the whole row.

A row of -1 is padding of a captured step: its id is 0 and no table is touched.

NaN logits count as -inf, +inf as the largest float. A -inf logit is sampled only when all are; then the id is 0.
Source: Maddison et al., "A* sampling", 2014 (Gumbel-max).
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.gumbel import (
    NOISE_BLOCK,
    block_gumbel,
    block_gumbel_reference,
    gumbel,
    gumbel_reference,
    random_bits,
)
from minisgl.kernels.launch import check, check_same, use_triton

GREEDY_BELOW = tl.constexpr(1e-5)  # a lower temperature is greedy: logits divided by it would overflow
CANDIDATES = tl.constexpr(128)  # C: 38 blocks of a vocabulary of 152k leave 4864, which stay in one program's registers
LARGEST = tl.constexpr(3.4028234663852886e38)
NO_ID = tl.constexpr(2**31 - 1)
MASKED_KEY = tl.constexpr(-2139095041)  # _key(-inf)
# Low bits of a logit's fp32 pattern that its dtype cannot set: no need to search them.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
# Read one value at a time, and possibly slices of any alignment: they must not compile a kernel each.
NARROW_POINTERS = ["rows_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr"]


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


def block_scores_reference(
    logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Log-sum-exp plus noise of each block  # [N, blocks]; logits  # [N, V] fp32, the rest  # [N]."""
    blocks = triton.cdiv(logits.shape[1], NOISE_BLOCK.value)
    padding = blocks * NOISE_BLOCK.value - logits.shape[1]
    padded = torch.nn.functional.pad(logits / temperature[:, None], (0, padding), value=-torch.inf)
    masses: torch.Tensor = padded.unflatten(1, (blocks, -1)).logsumexp(-1)
    return masses + block_gumbel_reference(seed, positions, blocks)


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
    """The same in torch. Rows pay for noise and for sorting only when they need it."""
    real = rows >= 0
    index = rows.long().clamp_min(0)
    wide = logits.float().nan_to_num(nan=-torch.inf, posinf=LARGEST.value, neginf=-torch.inf)
    ids = wide.argmax(-1)
    random = real & (temperature[index] >= GREEDY_BELOW.value) & (wide.amax(-1) > -torch.inf)
    if bool(random.any()):
        wide, index = wide[random], index[random]
        k, p, floor = top_k[index], top_p[index], min_p[index]
        scores = wide * (1 / temperature[index])[:, None]
        scores += gumbel_reference(seed[index], positions[random], wide.shape[1])
        filtered = ((k > 0) & (k < wide.shape[1])) | (p < 1) | (floor > 0)
        best_block = block_scores_reference(wide, temperature[index], seed[index], positions[random]).argmax(-1)
        of_token = torch.arange(wide.shape[1], device=wide.device) // NOISE_BLOCK.value
        scores.masked_fill_((of_token != best_block[:, None]) & ~filtered[:, None], -torch.inf)
        if bool(filtered.any()):
            some = filtered
            kept = kept_reference(wide[some], temperature[index][some], k[some], p[some], floor[some])
            scores[some] = scores[some].masked_fill(~kept, -torch.inf)
        ids[random] = scores.argmax(-1)
    out = ids.int() * real
    if tokens is not None:
        tokens[rows[real].long(), positions[real].long()] = out[real]
    return out


@triton.jit
def _load_logits(logits_row, ids, VOCAB: tl.constexpr):
    """fp32 logits with no NaN, +inf or -0; -inf for ids outside the vocabulary."""
    x = tl.load(logits_row + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    x = tl.minimum(x, LARGEST)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """int32 keys that order as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _smallest_of_key(key, SHIFT: tl.constexpr):
    """The smallest fp32 that has this key."""
    bits = (key << SHIFT).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_parameters(sample, rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, VOCAB: tl.constexpr):
    """(row, temperature, top_k or 0, top_p, min_p, seed, whether filters apply) of a sample; padding is greedy."""
    row = tl.load(rows_ptr + sample).to(tl.int64)
    padding = row < 0
    row = tl.maximum(row, 0)
    temperature = tl.where(padding, 0.0, tl.load(temperature_ptr + row))
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < VOCAB, top_k, 0)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    filtered = (temperature >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    row = tl.where(padding, -1, row)
    return row, temperature, top_k, top_p, min_p, tl.load(seed_ptr + row), filtered


@triton.jit
def _best_of_block(logits_row, block, seed, position, temperature, cutoff, VOCAB: tl.constexpr):
    """(score, id) of the best token whose logit is at or above `cutoff`, among the 4096 ids of a block."""
    counters = tl.arange(0, NOISE_BLOCK // 4)
    ids = counters + block * NOISE_BLOCK
    x0 = _load_logits(logits_row, ids, VOCAB)
    x1 = _load_logits(logits_row, ids + 1024, VOCAB)
    x2 = _load_logits(logits_row, ids + 2048, VOCAB)
    x3 = _load_logits(logits_row, ids + 3072, VOCAB)
    inverse = tl.div_rn(1.0, temperature)
    bits0, bits1, bits2, bits3 = random_bits(seed, position, counters + block * (NOISE_BLOCK // 4))
    x0 = tl.where(x0 >= cutoff, x0 * inverse + gumbel(bits0), float("-inf"))
    x1 = tl.where(x1 >= cutoff, x1 * inverse + gumbel(bits1), float("-inf"))
    x2 = tl.where(x2 >= cutoff, x2 * inverse + gumbel(bits2), float("-inf"))
    x3 = tl.where(x3 >= cutoff, x3 * inverse + gumbel(bits3), float("-inf"))
    best = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 0)
    winner = tl.where(x3 == best, ids + 3072, NO_ID)
    winner = tl.where(x2 == best, ids + 2048, winner)
    winner = tl.where(x1 == best, ids + 1024, winner)
    winner = tl.where(x0 == best, ids, winner)
    return best, tl.min(winner, 0)


@triton.jit(do_not_specialize=NARROW_POINTERS)
def _sample_blocks_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    block_best_ptr,
    block_id_ptr,
    block_mass_ptr,
    candidate_ptr,
    candidate_id_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Leaves of a block: (its score, its number); greedy (largest logit, its id); with filters (largest logit, floor
    key, mass) and the candidates.

    Every key above the floor is a candidate; mass is the sum of exp((logit - largest) / temperature).
    """
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    out = sample * BLOCKS + block
    logits_row = logits_ptr + sample * logits_stride
    row, temperature, top_k, top_p, min_p, seed, filtered = _load_parameters(
        sample, rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, VOCAB
    )
    ids = tl.arange(0, NOISE_BLOCK) + block * NOISE_BLOCK
    x = _load_logits(logits_row, ids, VOCAB)
    largest = tl.max(x, 0)
    if temperature < GREEDY_BELOW:
        tl.store(block_best_ptr + out, largest)
        tl.store(block_id_ptr + out, tl.min(tl.where(x == largest, ids, NO_ID), 0))
        return
    inverse = tl.div_rn(1.0, temperature)
    finite_largest = tl.maximum(largest, -LARGEST)
    mass = tl.sum(tl.exp((x - finite_largest) * inverse), 0)
    if filtered:
        keys = _key(x, SHIFT)
        tl.store(block_mass_ptr + out, mass)

        # Bisect for a floor with C / 2 to C keys above it: more than C are above `low`, at most C above `floor`.
        low = tl.full((), MASKED_KEY >> SHIFT, tl.int64)
        above = tl.sum((keys > low.to(tl.int32)).to(tl.int32), 0)
        floor = tl.where(above > CANDIDATES, tl.max(keys, 0).to(tl.int64), low)
        above = tl.where(above > CANDIDATES, 0, above)
        while (floor - low > 1) & (above < CANDIDATES // 2):
            middle = low + (floor - low) // 2
            above_middle = tl.sum((keys > middle.to(tl.int32)).to(tl.int32), 0)
            fits = above_middle <= CANDIDATES
            low = tl.where(fits, low, middle)
            floor = tl.where(fits, middle, floor)
            above = tl.where(fits, above_middle, above)

        chosen = keys > floor.to(tl.int32)
        slots = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(candidate_ptr + out * CANDIDATES + slots, x, mask=chosen)
        tl.store(candidate_id_ptr + out * CANDIDATES + slots, ids, mask=chosen)
        empty = tl.arange(0, CANDIDATES)
        tl.store(candidate_ptr + out * CANDIDATES + empty, float("-inf"), mask=empty >= above)
        tl.store(block_best_ptr + out, largest)
        tl.store(block_id_ptr + out, floor.to(tl.int32))
    else:
        noise = block_gumbel(seed, tl.load(positions_ptr + sample), block)
        tl.store(block_best_ptr + out, finite_largest * inverse + tl.log(mass) + noise)
        tl.store(block_id_ptr + out, block)


@triton.jit
def _largest_key(keys, weights, low, high, target):
    """The largest key in [low, high] such that the weights of keys at or above it reach `target`; low if none."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = tl.sum(tl.where(keys >= middle.to(tl.int32), weights, 0.0), 0) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def _row_weights(logits_row, pivots, largest, inverse, BY_MASS: tl.constexpr, VOCAB: tl.constexpr, SHIFT: tl.constexpr):
    """For each pivot, the number of keys at or above it, or their mass; pivots  # [WAYS]."""
    WAYS: tl.constexpr = pivots.shape[0]
    TILE: tl.constexpr = 1024
    total = tl.zeros((WAYS, TILE), tl.float32)
    for start in range(0, VOCAB, TILE):
        x = _load_logits(logits_row, tl.arange(0, TILE) + start, VOCAB)
        weights = tl.exp((x - largest) * inverse) if BY_MASS else tl.full((TILE,), 1.0, tl.float32)
        total += tl.where(_key(x, SHIFT)[None, :] >= pivots[:, None], weights[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def _largest_key_of_row(
    logits_row, low, high, target, largest, inverse, BY_MASS: tl.constexpr, VOCAB: tl.constexpr, SHIFT: tl.constexpr
):
    """_largest_key over a whole row, 17 ways a pass: at most 8 passes for 32 bits, 4 for the 16 of bf16."""
    WAYS: tl.constexpr = 16
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        step = (high - low + WAYS) // (WAYS + 1)
        pivots = tl.minimum(low + step * (1 + tl.arange(0, WAYS)), high)
        reached = _row_weights(logits_row, pivots.to(tl.int32), largest, inverse, BY_MASS, VOCAB, SHIFT) >= target
        low = tl.max(tl.where(reached, pivots, low), 0)
        high = tl.min(tl.where(reached, high, pivots - 1), 0)
    return low


@triton.jit(do_not_specialize=[*NARROW_POINTERS, "tokens_ptr"])
def _sample_rows_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    block_best_ptr,
    block_id_ptr,
    block_mass_ptr,
    candidate_ptr,
    candidate_id_ptr,
    out_ptr,
    tokens_ptr,
    logits_stride,
    tokens_stride,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + sample)
    logits_row = logits_ptr + sample * logits_stride
    row, temperature, top_k, top_p, min_p, seed, filtered = _load_parameters(
        sample, rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, VOCAB
    )
    blocks = tl.arange(0, BLOCK_BLOCKS)
    of_blocks = sample * BLOCKS + blocks
    block_best = tl.load(block_best_ptr + of_blocks, mask=blocks < BLOCKS, other=float("-inf"))
    block_id = tl.load(block_id_ptr + of_blocks, mask=blocks < BLOCKS, other=-NO_ID - 1)
    best = tl.max(block_best, 0)
    if filtered:
        largest = tl.maximum(best, -LARGEST)
        inverse = tl.div_rn(1.0, temperature)
        floor = tl.max(block_id, 0)
        highest = _key(largest, SHIFT)
        block_mass = tl.load(block_mass_ptr + of_blocks, mask=blocks < BLOCKS, other=0.0)
        mass = tl.sum(block_mass * tl.exp((block_best - largest) * inverse), 0)
        min_p_cutoff = tl.where(min_p > 0.0, largest + temperature * tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))

        slots = tl.arange(0, BLOCK_SLOTS)
        of_slots = sample * (BLOCKS * CANDIDATES) + slots
        x = tl.load(candidate_ptr + of_slots, mask=slots < BLOCKS * CANDIDATES, other=float("-inf"))
        keys = _key(x, SHIFT)
        weights = tl.exp((x - largest) * inverse)
        key = tl.full((), (MASKED_KEY >> SHIFT) + 1, tl.int64)
        if top_k > 0:
            key = _largest_key(keys, tl.full((BLOCK_SLOTS,), 1.0, tl.float32), key, highest, top_k.to(tl.float32))
            mass = tl.sum(tl.where(keys >= key.to(tl.int32), weights, 0.0), 0)
        complete = (top_k == 0) | (key > floor)
        if complete & (top_p < 1.0):
            key = _largest_key(keys, weights, key, highest, top_p * mass)
        cutoff = tl.maximum(_smallest_of_key(key, SHIFT), min_p_cutoff)
        complete = complete & (cutoff >= _smallest_of_key(floor.to(tl.int64) + 1, SHIFT))

        if complete:
            ids = tl.load(candidate_id_ptr + of_slots, mask=x > float("-inf"), other=0)
            bits0, bits1, bits2, bits3 = random_bits(seed, position, ids // NOISE_BLOCK * 1024 + ids % 1024)
            output = ids % NOISE_BLOCK // 1024
            bits = tl.where(output < 2, tl.where(output == 0, bits0, bits1), tl.where(output == 2, bits2, bits3))
            scores = tl.where(x >= cutoff, x * inverse + gumbel(bits), float("-inf"))
            best = tl.max(scores, 0)
            winner = tl.min(tl.where(scores == best, ids, NO_ID), 0)
        else:
            key = tl.full((), (MASKED_KEY >> SHIFT) + 1, tl.int64)
            if top_k > 0:
                count = top_k.to(tl.float32)
                key = _largest_key_of_row(logits_row, key, highest, count, largest, inverse, False, VOCAB, SHIFT)
                pivots = tl.zeros((1,), tl.int32) + key.to(tl.int32)
                mass = tl.max(_row_weights(logits_row, pivots, largest, inverse, True, VOCAB, SHIFT), 0)
            if top_p < 1.0:
                part = top_p * mass
                key = _largest_key_of_row(logits_row, key, highest, part, largest, inverse, True, VOCAB, SHIFT)
            cutoff = tl.maximum(_smallest_of_key(key, SHIFT), min_p_cutoff)
            best = float("-inf")
            winner = 0
            for block in range(BLOCKS):
                score, block_winner = _best_of_block(logits_row, block, seed, position, temperature, cutoff, VOCAB)
                winner = tl.where(score > best, block_winner, winner)
                best = tl.maximum(best, score)
    else:
        winner = tl.min(tl.where((block_best == best) & (blocks < BLOCKS), block_id, NO_ID), 0)
        if temperature >= GREEDY_BELOW:
            block = tl.minimum(winner, BLOCKS - 1)
            best, winner = _best_of_block(logits_row, block, seed, position, temperature, float("-inf"), VOCAB)
    winner = tl.where((best > float("-inf")) & (row >= 0), tl.minimum(winner, VOCAB - 1), 0)
    tl.store(out_ptr + sample, winner)
    if HAS_TOKENS:
        tl.store(tokens_ptr + row * tokens_stride + position, winner, mask=row >= 0)


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
    check(logits.dim() == 2 and logits.shape[1] > 0, f"logits: expected [N, V], got {list(logits.shape)}")
    check(logits.stride(-1) == 1, "logits: last dimension must be contiguous")
    check(logits.dtype in UNUSED_BITS, f"logits: has dtype {logits.dtype}, expected float32, float16 or bfloat16")
    samples, vocab = logits.shape
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

    blocks, device = triton.cdiv(vocab, NOISE_BLOCK.value), logits.device
    ids = torch.empty(samples, dtype=torch.int32, device=device)
    if samples == 0:
        return ids
    block_best = torch.empty(samples, blocks, dtype=torch.float32, device=device)
    block_mass = torch.empty_like(block_best)
    block_id = torch.empty_like(block_best, dtype=torch.int32)
    candidates = torch.empty(samples, blocks, CANDIDATES.value, dtype=torch.float32, device=device)
    candidate_ids = torch.empty_like(candidates, dtype=torch.int32)
    parameters = (rows, positions, temperature, top_k, top_p, min_p, seed)
    scratch = (block_best, block_id, block_mass, candidates, candidate_ids)
    shift = UNUSED_BITS[logits.dtype]
    _sample_blocks_kernel[(samples, blocks)](
        logits,
        *parameters,
        *scratch,
        logits.stride(0),  # fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide
        VOCAB=vocab,
        BLOCKS=blocks,
        SHIFT=shift,
        num_warps=8,  # 16 logits a thread
    )
    _sample_rows_kernel[(samples,)](
        logits,
        *parameters,
        *scratch,
        ids,
        tokens,
        logits.stride(0),
        tokens.stride(0) if tokens is not None else 0,
        VOCAB=vocab,
        BLOCKS=blocks,
        SHIFT=shift,
        HAS_TOKENS=tokens is not None,
        BLOCK_BLOCKS=triton.next_power_of_2(blocks),
        BLOCK_SLOTS=triton.next_power_of_2(blocks * CANDIDATES.value),
        num_warps=16,  # 16 candidates a thread at a vocabulary of 152k
    )
    return ids
