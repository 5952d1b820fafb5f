"""Logprobs of sampled tokens and of the likeliest ones, without a softmax in memory.

    logprob(id) = logit[id] - log(sum over the vocabulary of exp(logit))

at temperature 1, of the logits as they are given. The likeliest tokens come best first; of equal ones the smallest id
does. Prompts go through in chunks of rows: memory does not grow with prompt length times vocabulary.

Legend: N samples, V vocabulary, K likeliest. logits  # [N, V].
Bound by memory: reads [N, V] once; then by K steps of one program a row, which wait for each other.

Two launches: `vocab_blocks.summarize_blocks`, and one with a program a row, which keeps the largest logit of every
block that was not taken yet. A step takes the best of these, reads that one block, and finds what is left in it.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import check, check_same, use_triton
from minisgl.kernels.vocab_blocks import (
    LARGEST,
    NO_ID,
    Shape,
    clean_reference,
    first_best,
    load_blocks,
    summarize_blocks,
)

MAX_TOP = 20  # likeliest tokens a row, what the OpenAI API allows
NUM_WARPS = 8  # of a row: 16 blocks a thread in a vocabulary of 152k


def logprobs_reference(
    logits: torch.Tensor, ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in torch; see `logprobs`."""
    left = clean_reference(logits)
    total = left.logsumexp(-1)
    of_ids = left.gather(1, ids.long().clamp_min(0)[:, None]).squeeze(1) - total
    top_ids = torch.full((len(left), num_top), -1, dtype=torch.int32, device=left.device)
    top = torch.full_like(top_ids, -torch.inf, dtype=torch.float32)
    for place in range(num_top):  # a few looks for the best are much less than sorting
        best, best_ids = left.max(-1)  # of equal ones the first
        some = best > -torch.inf
        top_ids[some, place], top[some, place] = best_ids[some].int(), (best - total)[some]
        left.scatter_(1, best_ids[:, None], -torch.inf)
    return of_ids.where((of_ids == of_ids) & (ids >= 0), -torch.inf), top_ids, top


@triton.jit(do_not_specialize=["ids_ptr", "num_top"])
def _logprobs_kernel(
    logits_ptr,
    logits_stride,
    ids_ptr,
    largest_ptr,
    mass_ptr,
    out_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    num_top,
    SHAPE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + sample * logits_stride
    blocks = tl.arange(0, SHAPE.lanes)
    of_blocks = sample * SHAPE.blocks + blocks
    left = tl.load(largest_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=float("-inf"))
    mass = tl.load(mass_ptr + of_blocks, mask=blocks < SHAPE.blocks, other=0.0)
    largest = tl.maximum(tl.max(left, 0), -LARGEST)
    log_mass = tl.log(tl.sum(mass * tl.exp(left - largest), 0))

    id = tl.load(ids_ptr + sample)
    of_id = tl.load(logits_row + id, mask=id >= 0, other=float("-inf")).to(tl.float32)
    of_id = tl.minimum(tl.where(of_id == of_id, of_id, float("-inf")), LARGEST)
    tl.store(out_ptr + sample, tl.where(of_id > float("-inf"), of_id - largest - log_mass, float("-inf")))

    # Taken are the logits above `best` and, of those that equal it, the ids up to `taken`: no list of them is needed.
    best, taken = float("inf"), -1
    for place in range(num_top):
        last_best, last_taken = best, taken
        best, block = first_best(left, blocks)
        x, ids = load_blocks(logits_row, block + tl.zeros((1,), tl.int32), SHAPE)
        x, ids = tl.ravel(x), tl.ravel(ids)
        remains = (x < last_best) | (ids > last_taken)
        taken = tl.min(tl.where(remains & (x == best), ids, NO_ID), 0)
        remains = (x < best) | ((x == best) & (ids > taken))
        left = tl.where(blocks == block, tl.max(tl.where(remains, x, float("-inf")), 0), left)
        found = best > float("-inf")
        out = sample * num_top + place
        tl.store(top_ids_ptr + out, tl.where(found, taken, -1))
        tl.store(top_logprobs_ptr + out, tl.where(found, best - largest - log_mass, float("-inf")))


def logprobs(
    logits: torch.Tensor, ids: torch.Tensor, num_top: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob of each id  # [N] fp32, ids of the K likeliest  # [N, K] int32, their logprobs  # [N, K] fp32).

    logits   # [N, V] fp32, bf16 or fp16; rows may be strided. NaN counts as -inf, +inf as the largest float
    ids      # [N] int32, in -1..V-1 (not checked: it would synchronise); -1 has logprob -inf
    num_top  K, in 0..20 and at most V

    A token with a logit of -inf has logprob -inf; where fewer than K others are, the rest is id -1, logprob -inf.
    Raises ValueError for a wrong shape, stride, dtype, device or `num_top`.
    """
    shape, samples = Shape.of(logits), len(logits)
    check(ids.shape == (samples,), f"ids: expected [{samples}], got {list(ids.shape)}")
    check(ids.is_contiguous(), "ids: must be contiguous")
    check_same("ids", ids, device=logits.device, dtype=torch.int32)
    most = min(MAX_TOP, shape.vocab)
    check(0 <= num_top <= most, f"num_top: is {num_top}, expected 0..{most}")
    if not use_triton(logits):
        return logprobs_reference(logits, ids, num_top)
    out = torch.empty(samples, dtype=torch.float32, device=logits.device)
    top_ids = torch.empty(samples, num_top, dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty_like(top_ids, dtype=torch.float32)
    if samples:
        largest, mass = summarize_blocks(logits)
        _logprobs_kernel[(samples,)](
            logits,
            logits.stride(0),
            ids,
            largest,
            mass,
            out,
            top_ids,
            top_logprobs,
            num_top,
            SHAPE=shape,
            num_warps=NUM_WARPS,
        )
    return out, top_ids, top_logprobs
