"""Matmuls of a prefill on Hopper with the gate, or with what is done to q, k and v, in the launch, at shapes of
Qwen3-0.6B to 14B, bf16, pages of 64; beside torch's matmul and the kernel that follows it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.bench.heads_matmul_sm90 import HEAD_DIM, KV_HEADS, random, stored_heads
from minisgl.kernels.prefill_matmul_sm90 import fits_gated, fits_heads, gated_matmul, heads_matmul
from minisgl.kernels.rotary import rotary_store
from minisgl.kernels.silu_mul import silu_mul

ARCHITECTURES = ("sm_90",)
MODELS = ((1024, 3072, 16), (4096, 12288, 32), (5120, 17408, 40))  # hidden and inner size, query heads
TOKENS = (2048, 8448)


def cases(device: torch.device) -> Iterator[Case]:
    for hidden, inner, heads in MODELS:
        for tokens in TOKENS:
            yield from _gated(tokens, hidden, inner, device)
            yield from _heads(tokens, hidden, heads, device)


def _gated(tokens: int, hidden: int, inner: int, device: torch.device) -> Iterator[Case]:
    x, weight = random(device, tokens, hidden), random(device, 2 * inner, hidden)
    if not fits_gated(x, weight):
        return
    yield Case(
        op="prefill_matmul_sm90",
        shape=f"{tokens} x {hidden} -> {2 * inner}, gated",
        run=lambda: gated_matmul(x, weight, None),
        baselines={"torch": lambda: silu_mul(F.linear(x, weight))},
        bytes_moved=x.nbytes + weight.nbytes + 2 * tokens * inner,
        flops=4 * tokens * hidden * inner,
    )


def _heads(tokens: int, hidden: int, heads: int, device: torch.device) -> Iterator[Case]:
    width = (heads + 2 * KV_HEADS) * HEAD_DIM
    x, weight, stored = random(device, tokens, hidden), random(device, width, hidden), stored_heads(tokens, device)
    if not fits_heads(x, weight, stored[2]):
        return
    yield Case(
        op="prefill_matmul_sm90",
        shape=f"{tokens} x {hidden} -> {heads}/{KV_HEADS} heads of {HEAD_DIM}",
        run=lambda: heads_matmul(x, weight, None, *stored),
        baselines={"torch": lambda: rotary_store(F.linear(x, weight), *stored)},
        bytes_moved=x.nbytes + weight.nbytes + tokens * (2 * width + 4 * HEAD_DIM),
        flops=2 * tokens * hidden * width,
    )
