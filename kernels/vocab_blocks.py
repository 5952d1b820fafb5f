"""A row of logits as blocks of 64 token ids: what `sampling` and `logprobs` share.

    largest[n, b] = max of the block's logits
    mass[n, b]    = sum over the block of exp((logit - largest[n, b]) / temperature[rows[n]])

Every logit above a floor is in a block whose largest logit is. So the few largest logits of a row are found without
sorting it: choose a floor that few blocks reach, list these, and look nowhere else.

Legend: N samples, V vocabulary, B blocks, R rows of the temperature table. logits  # [N, V].
Bound by memory: reads [N, V] once, and writes 8 bytes a block, 6% of that in bf16.

NaN logits count as -inf, +inf as the largest float.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import cdiv, check, check_same, next_power_of_2, use_triton

BLOCK = 64  # token ids a block: 128 bytes of bf16, and 2,374 blocks in a vocabulary of 152k
GREEDY_BELOW = tl.constexpr(1e-5)  # a lower temperature is greedy: logits divided by it would overflow
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
NO_ID = tl.constexpr(2**31 - 1)
MASKED_KEY = tl.constexpr(-2139095041)  # key_of(-inf), unshifted
# Low bits of a logit's fp32 pattern that its dtype cannot set: keys leave them out.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

PROGRAM_BLOCKS, PROGRAM_WARPS = 64, 8  # of a program: 16 logits a thread, in two loads of bf16


class Shape(NamedTuple):
    """What a kernel over blocks is compiled for; a plain tuple, of which kernels see the fields and nothing else."""

    vocab: int
    shift: int  # UNUSED_BITS of the dtype
    blocks: int
    lanes: int  # blocks, rounded up to a power of two
    block: int = BLOCK

    @classmethod
    def of(cls, logits: torch.Tensor, vocab: int | None = None) -> "Shape":
        """The shape of logits  # [N, V], of which the columns from `vocab` on are padding.

        Raises ValueError for a wrong shape, stride or dtype.
        """
        check(logits.dim() == 2 and logits.shape[1] > 0, f"logits: expected [N, V], got {list(logits.shape)}")
        check(logits.stride(-1) == 1, "logits: last dimension must be contiguous")
        check(logits.dtype in UNUSED_BITS, f"logits: has dtype {logits.dtype}, expected float32, float16 or bfloat16")
        columns = logits.shape[1]
        vocab, blocks = columns if vocab is None else vocab, cdiv(columns, BLOCK)
        return cls(vocab, UNUSED_BITS[logits.dtype], blocks, next_power_of_2(blocks))


def clean_reference(logits: torch.Tensor, vocab: int | None = None) -> torch.Tensor:
    """fp32 logits with no NaN or +inf, and -inf in the columns from `vocab` on."""
    clean: torch.Tensor = logits.float().nan_to_num(nan=-torch.inf, posinf=LARGEST.value, neginf=-torch.inf)
    if vocab is not None:
        clean[:, vocab:] = -torch.inf
    return clean


def blocks_reference(x: torch.Tensor) -> torch.Tensor:
    """[N, V] cut in blocks  # [N, B, block]; what the last one lacks is -inf."""
    padded: torch.Tensor = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK), value=-torch.inf)
    return padded.reshape(len(x), -(-x.shape[1] // BLOCK), BLOCK)


def summarize_blocks_reference(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch; see `summarize_blocks`."""
    blocks = blocks_reference(clean_reference(logits, vocab))
    largest = blocks.amax(-1)
    above = blocks - largest.clamp_min(-LARGEST.value)[..., None]
    if rows is not None and temperature is not None:
        above /= temperature[rows.long().clamp_min(0)][:, None, None]
    return largest, torch.exp(above).sum(-1)


@triton.jit
def load_blocks(logits_row, blocks, SHAPE: tl.constexpr):
    """(logits, ids)  # [blocks, block]: fp32 with no NaN or +inf, and -inf for ids outside the vocabulary."""
    ids = blocks[:, None] * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
    x = tl.load(logits_row + ids, mask=ids < SHAPE.vocab, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST), ids


@triton.jit
def softmax_weights(x, largest, temperature):
    """exp((x - largest) / temperature)"""
    return tl.exp2((x - largest) * tl.div_rn(LOG2_E, temperature))


@triton.jit
def key_of(x, SHAPE: tl.constexpr):
    """int32 keys that order as the floats do."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 and 0 tie
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHAPE.shift


@triton.jit
def smallest_of_key(key, SHAPE: tl.constexpr):
    """The smallest fp32 that has this key."""
    bits = (key << SHAPE.shift).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(scores, numbers):
    """(the best score, the smallest number that has it)."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, numbers, NO_ID), 0)


@triton.jit
def floor_of_list(keys, wanted, limit, lowest_floor):
    """A key from `lowest_floor` on that at most `limit` of the keys reach, and at least `wanted` unless keys tie."""
    reaching = tl.sum((keys >= lowest_floor.to(tl.int32)).to(tl.int32), 0)
    floor = tl.where(reaching <= limit, lowest_floor, tl.max(keys, 0).to(tl.int64) + 1)
    low = tl.min(tl.where(keys >= lowest_floor.to(tl.int32), keys, NO_ID), 0).to(tl.int64)
    reaching = 0
    while (floor - low > 1) & (reaching < wanted):
        middle = low + (floor - low) // 2
        reaching_middle = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        fits = reaching_middle <= limit
        low = tl.where(fits, low, middle)
        floor = tl.where(fits, middle, floor)
        reaching = tl.where(fits, reaching_middle, reaching)
    return floor


@triton.jit
def write_list(list_ptr, keys, floor):
    """Write the numbers of the blocks whose keys reach the floor, in order; returns how many."""
    listed = (keys >= floor.to(tl.int32)).to(tl.int32)
    tl.store(list_ptr + tl.cumsum(listed, 0) - 1, tl.arange(0, keys.shape[0]), mask=listed > 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it
    return tl.sum(listed, 0)


@triton.jit
def load_listed(logits_row, list_ptr, start, num_listed, SHAPE: tl.constexpr, READ_BLOCKS: tl.constexpr):
    """(logits, ids)  # [READ_BLOCKS, block] of the list from `start` on; past its end all are -inf."""
    slots = start + tl.arange(0, READ_BLOCKS)
    blocks = tl.load(list_ptr + slots, mask=slots < num_listed, other=SHAPE.blocks)
    return load_blocks(logits_row, blocks, SHAPE)


# rows and temperature are read one value at a time, and may be slices of any alignment.
@triton.jit(do_not_specialize=["rows_ptr", "temperature_ptr"])
def _summarize_blocks_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    temperature_ptr,
    largest_ptr,
    mass_ptr,
    SHAPE: tl.constexpr,
    PROGRAM_BLOCKS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    blocks = tl.program_id(0) * PROGRAM_BLOCKS + tl.arange(0, PROGRAM_BLOCKS)
    x, _ = load_blocks(logits_ptr + sample * logits_stride, blocks, SHAPE)
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + tl.maximum(tl.load(rows_ptr + sample), 0))
    largest = tl.max(x, 1)
    out = sample * SHAPE.blocks + blocks
    tl.store(largest_ptr + out, largest, mask=blocks < SHAPE.blocks)
    if temperature >= GREEDY_BELOW:
        weights = softmax_weights(x, tl.maximum(largest, -LARGEST)[:, None], temperature)
        tl.store(mass_ptr + out, tl.sum(weights, 1), mask=blocks < SHAPE.blocks)


def summarize_blocks(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest, mass)  # [N, B] fp32; mass is not written for a temperature below GREEDY_BELOW.

    logits       # [N, V] fp32, bf16 or fp16; rows may be strided
    rows         # [N] int32, row of the temperature table; -1: padding, takes row 0's
    temperature  # [R] fp32; without rows and temperature, it is 1
    vocab        the columns from here on are padding, and count as -inf

    Rows must be inside the table (not checked: it would synchronise).
    Raises ValueError for a wrong shape, stride, dtype or device.
    """
    shape = Shape.of(logits, vocab)
    check((rows is None) == (temperature is None), "temperature: comes with rows, or neither is given")
    if rows is not None and temperature is not None:
        check(rows.shape == logits.shape[:1], f"rows: expected [{len(logits)}], got {list(rows.shape)}")
        check(temperature.dim() == 1, f"temperature: expected [R], got {list(temperature.shape)}")
        for name, x, dtype in (("rows", rows, torch.int32), ("temperature", temperature, torch.float32)):
            check(x.is_contiguous(), f"{name}: must be contiguous")
            check_same(name, x, device=logits.device, dtype=dtype)
    if not use_triton(logits):
        return summarize_blocks_reference(logits, rows, temperature, vocab)
    # Not two halves of one: where the second starts would tell odd numbers of samples from even ones.
    largest, mass = (logits.new_empty(len(logits), shape.blocks, dtype=torch.float32) for _ in range(2))
    if len(logits):
        # The stride is fixed by the model, so specialised: a multiple of 16 keeps the loads 16 bytes wide.
        _summarize_blocks_kernel[(cdiv(shape.blocks, PROGRAM_BLOCKS), len(logits))](
            logits,
            logits.stride(0),
            rows,
            temperature,
            largest,
            mass,
            SHAPE=shape,
            PROGRAM_BLOCKS=PROGRAM_BLOCKS,
            HAS_TEMPERATURE=temperature is not None,
            num_warps=PROGRAM_WARPS,
        )
    return largest, mass
