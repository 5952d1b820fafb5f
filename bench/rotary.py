"""Rotary, qk-norm and KV store at the heads of Qwen3-0.6B and 8B, bf16, pages of 64."""

from collections.abc import Iterator

import torch

from minisgl.bench.harness import Case
from minisgl.kernels.rotary import Rotary, rotary_store, rotary_store_reference

HEAD_DIM, KV_HEADS, PAGE_SIZE, MAX_LEN = 128, 8, 64, 40_960


def cases(device: torch.device) -> Iterator[Case]:
    for heads in (16, 32):
        for tokens in (1, 64, 256, 8192):
            yield _case(tokens, heads, device)


def _case(tokens: int, heads: int, device: torch.device) -> Case:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=device)

    pages = tokens // PAGE_SIZE + 1
    arguments = (
        random(tokens, (heads + 2 * KV_HEADS) * HEAD_DIM),
        torch.arange(tokens, dtype=torch.int32, device=device),
        torch.randperm(pages * PAGE_SIZE, device=device)[:tokens].int(),
        random(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        random(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        Rotary(torch.rand(MAX_LEN, HEAD_DIM, device=device), random(HEAD_DIM), random(HEAD_DIM), 1e-6),
    )

    def run() -> None:
        rotary_store(*arguments)

    def baseline() -> None:
        rotary_store_reference(*arguments)

    return Case(
        op="rotary",
        shape=f"{tokens} tokens, {heads}/{KV_HEADS} heads of {HEAD_DIM}",
        run=run,
        baselines={"torch": baseline},
        bytes_moved=2 * arguments[0].nbytes + tokens * HEAD_DIM * 4,
    )
