"""Longest common prefixes of many pairs of token sequences, in one launch.

    lengths[n] = the largest length <= lengths[n] such that queries[query_starts[n] + i] == keys[key_starts[n] + i]
                 for every i below it

Legend: N pairs. Tokens are packed in 1-D tensors; each pair names where its two sequences start, so that pairs may
share tokens: neighbours in a sorted list are pairs of one tensor, starts[:-1] against starts[1:].

Bound by memory: 8 bytes for each token compared (64 pairs of 32k tokens are 17 MB, about 4 us on an H200), or by one
program's walk when a single pair is far longer than the rest. The programs of a pair take its chunks in turn, so the
pair is read front to back by all of them at once. `lengths` itself is what they share: after each chunk a program
lowers it to the first difference it met, sees what the others left there, and stops when its next chunk lies beyond.
However the programs interleave, the result is the same. A pair that differs at once costs a chunk for each of its
programs; there are about 1024 programs, or one a pair, so 1024 such pairs read 17 MB in vain.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.launch import cdiv, check, check_same, next_power_of_2, use_triton

CHUNK = 2048  # tokens a program compares at once: 8 a thread from each sequence, at 8 warps
PROGRAMS = 1024  # about one wave: an H200 holds 1056 programs of 8 warps
MAX_PROGRAMS_OF_PAIR = 64  # one pair of 128k tokens in one turn


def common_prefix_lengths_reference(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    keys: torch.Tensor,
    key_starts: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """The same in torch, pair by pair."""
    pairs = zip(query_starts.tolist(), key_starts.tolist(), lengths.tolist(), strict=True)
    for pair, (query, key, length) in enumerate(pairs):
        differ = (queries[query : query + length] != keys[key : key + length]).nonzero()
        if len(differ):
            lengths[pair] = differ[0, 0]
    return lengths


# Slices such as starts[1:] are less aligned than whole tensors; no load is wide enough to gain from alignment.
@triton.jit(do_not_specialize=["queries_ptr", "query_starts_ptr", "keys_ptr", "key_starts_ptr", "lengths_ptr"])
def _common_prefix_kernel(queries_ptr, query_starts_ptr, keys_ptr, key_starts_ptr, lengths_ptr, CHUNK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    query = queries_ptr + tl.load(query_starts_ptr + pair).to(tl.int64)
    key = keys_ptr + tl.load(key_starts_ptr + pair).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    # Other programs write this value. A scalar atomic is done once a program and handed to all its warps; a plain load
    # is done by each warp, and warps that saw different ends would part in the loop and hang at its barriers.
    end = tl.atomic_min(lengths_ptr + pair, 2**31 - 1, sem="relaxed")
    while start < end:
        place = start + tl.arange(0, CHUNK)
        mask = place < end
        # A place past the end compares equal: both sides read 0.
        same = tl.load(query + place, mask=mask, other=0) == tl.load(key + place, mask=mask, other=0)
        first = tl.min(tl.where(same, end, place), 0)
        end = tl.minimum(tl.atomic_min(lengths_ptr + pair, first, sem="relaxed"), first)
        start += tl.num_programs(1) * CHUNK


def common_prefix_lengths(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    keys: torch.Tensor,
    key_starts: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Lower lengths  # [N] int32 in place to the common prefix lengths of N pairs, and return it.

    queries, keys             # 1-D int32, packed tokens; they may be one tensor
    query_starts, key_starts  # [N] int64 or int32, where each sequence starts
    lengths                   # [N] int32, on entry what to compare at most: the shorter length of the pair, 0 included

    Starts and lengths must stay inside the tokens (not checked: it would synchronise).
    Raises ValueError for a wrong shape, stride, dtype or device.
    """
    for name, tokens in (("queries", queries), ("keys", keys)):
        check(tokens.dim() == 1, f"{name}: expected one dimension, got {list(tokens.shape)}")
        check(tokens.is_contiguous(), f"{name}: must be contiguous")
        check_same(name, tokens, device=lengths.device, dtype=torch.int32)
    check(lengths.dim() == 1, f"lengths: expected [N], got {list(lengths.shape)}")
    check(lengths.is_contiguous(), "lengths: must be contiguous")
    check_same("lengths", lengths, device=lengths.device, dtype=torch.int32)
    for name, starts in (("query_starts", query_starts), ("key_starts", key_starts)):
        check(starts.shape == lengths.shape, f"{name}: expected {list(lengths.shape)}, got {list(starts.shape)}")
        check(starts.is_contiguous(), f"{name}: must be contiguous")
        wide = torch.int32 if starts.dtype == torch.int32 else torch.int64
        check_same(name, starts, device=lengths.device, dtype=wide)
    if not use_triton(lengths):
        return common_prefix_lengths_reference(queries, query_starts, keys, key_starts, lengths)

    pairs = len(lengths)
    if pairs == 0:
        return lengths
    programs_of_pair = min(next_power_of_2(cdiv(PROGRAMS, pairs)), MAX_PROGRAMS_OF_PAIR)
    _common_prefix_kernel[(pairs, programs_of_pair)](
        queries, query_starts, keys, key_starts, lengths, CHUNK=CHUNK, num_warps=8
    )
    return lengths
