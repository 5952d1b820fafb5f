"""q, k and v of a decode batch on Hopper in one launch, at shapes of Qwen3-0.6B to 14B, bf16, pages of 64; beside
torch's matmul and the kernel that follows it. Each launch has another copy of the weight."""

from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.bench.matmul_sm90 import weight_copies
from minisgl.kernels.heads_matmul_sm90 import fits_heads, heads_matmul
from minisgl.kernels.matmul_sm90 import WHOLE
from minisgl.kernels.rotary import Rotary, rotary_store

ARCHITECTURES = ("sm_90",)
HEAD_DIM, KV_HEADS, PAGE_SIZE, MAX_LEN = 128, 8, 64, 40_960
MODELS = ((1024, 16), (4096, 32), (5120, 40))  # hidden size, query heads
ROWS = (32, 64, 128, 192, 256)

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Rotary]  # positions, slots, keys, values, ...


def cases(device: torch.device) -> Iterator[Case]:
    for hidden, heads in MODELS:
        width = (heads + 2 * KV_HEADS) * HEAD_DIM
        weights = weight_copies(WHOLE, width, hidden, device)
        for rows in ROWS:
            x, stored = random(device, rows, hidden), stored_heads(rows, device)
            if fits_heads(x, weights[0], stored[2]):
                yield _case(x, weights, stored, heads)


def random(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.bfloat16, device=device)


def stored_heads(tokens: int, device: torch.device) -> Stored:
    """What `rotary_store` takes beside so many rows of q, k and v."""
    pages = tokens // PAGE_SIZE + 1
    return (
        torch.arange(tokens, dtype=torch.int32, device=device),
        torch.randperm(pages * PAGE_SIZE, device=device)[:tokens].int(),
        random(device, pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        random(device, pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        Rotary(torch.rand(MAX_LEN, HEAD_DIM, device=device), random(device, HEAD_DIM), random(device, HEAD_DIM), 1e-6),
    )


def _case(x: torch.Tensor, weights: list[torch.Tensor], stored: Stored, heads: int) -> Case:
    (rows, hidden), width = x.shape, weights[0].shape[0]
    copies, torch_copies = cycle(weights), cycle(weights)
    return Case(
        op="heads_matmul_sm90",
        shape=f"{rows} x {hidden} -> {heads}/{KV_HEADS} heads of {HEAD_DIM}",
        run=lambda: heads_matmul(x, next(copies), None, *stored),
        baselines={"torch": lambda: rotary_store(F.linear(x, next(torch_copies)), *stored)},
        bytes_moved=x.nbytes + weights[0].nbytes + rows * (2 * width + 4 * HEAD_DIM),
        flops=2 * rows * hidden * width,
    )
