"""Logprobs at Qwen3's vocabulary, bf16 logits: of the sampled token alone, and with the 20 likeliest."""

from collections.abc import Callable, Iterator

import torch

from minisgl.bench.harness import Case
from minisgl.kernels.logprobs import logprobs

VOCAB = 151_936


def cases(device: torch.device) -> Iterator[Case]:
    for samples in (1, 64, 256):
        logits = (torch.randn(samples, VOCAB, device=device) * 3).bfloat16()
        for num_top in (0, 20):
            yield _case(logits, num_top)


def _case(logits: torch.Tensor, num_top: int) -> Case:
    ids = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    return Case(
        op="logprobs",
        shape=f"{len(logits)} x {VOCAB}, top {num_top}",
        run=lambda: logprobs(logits, ids, num_top),
        baselines={"torch": _baseline(logits, ids, num_top)},
        bytes_moved=logits.nbytes,
    )


def _baseline(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> Callable[[], object]:
    places = ids.long()[:, None]

    def run() -> object:
        every = logits.float().log_softmax(-1)
        return every.gather(1, places), every.topk(num_top) if num_top else None

    return run
