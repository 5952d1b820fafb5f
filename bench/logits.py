"""Edits of logits at Qwen3's vocabulary, bf16: penalties over texts of 2,048 tokens, half of them output; masks."""

from collections.abc import Iterator

import torch

from minisgl.bench.harness import Case
from minisgl.kernels.logits import Edits, edit_logits

VOCAB, TEXT_TOKENS = 151_936, 2048


def cases(device: torch.device) -> Iterator[Case]:
    for samples in (1, 64, 256):
        logits = torch.randn(samples, VOCAB, device=device).bfloat16()
        for kind in ("nothing", "penalties", "mask"):
            yield _case(kind, logits)


def _case(kind: str, logits: torch.Tensor) -> Case:
    samples, device = len(logits), logits.device
    rows = torch.arange(samples, dtype=torch.int32, device=device)
    positions = torch.full_like(rows, TEXT_TOKENS)
    tokens = torch.randint(VOCAB, (samples, TEXT_TOKENS), dtype=torch.int32, device=device)
    counts = torch.zeros(samples, VOCAB, dtype=torch.int32, device=device)
    edits = Edits.none(samples, 8, device)
    edits.prompt_length.fill_(TEXT_TOKENS // 2)
    if kind == "penalties":
        edits.repetition.fill_(1.0001)  # edits add up over the runs, and stay finite
        edits.frequency.fill_(0.0001)
    masks = torch.full((samples, VOCAB // 32), 0x55555555, dtype=torch.int32, device=device)
    masked = (masks, rows) if kind == "mask" else (None, None)
    bytes_moved = {
        "nothing": 0,
        "penalties": tokens.nbytes * 2 + tokens.numel() * 2 * (counts.itemsize + logits.itemsize),
        "mask": masks.nbytes + logits.nbytes // 2,
    }
    return Case(
        op="logits",
        shape=f"{samples} x {VOCAB}, {kind}",
        run=lambda: edit_logits(logits, rows, positions, tokens, TEXT_TOKENS, edits, counts, *masked),
        baselines={},
        bytes_moved=bytes_moved[kind],
    )
