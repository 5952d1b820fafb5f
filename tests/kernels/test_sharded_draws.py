"""Ranks that each have a slice of the logits draw what one rank draws of them all."""

import pytest
import torch

from minisgl.kernels import launch
from tests.kernels.sharded_ranks import ROWS, asked, check_equals_one_rank, sample_in_slices

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("num_ranks, vocab", [(2, 1000), (4, 264)] + [(4, 151_936)] * HAS_GPU)
def test_equals_one_rank(num_ranks, vocab, dtype, device):
    check_equals_one_rank(num_ranks, vocab, dtype, device, filters=False)


@pytest.mark.parametrize("num_ranks, vocab", [(2, 1000), (4, 5000), (8, 264), (3, 63)])
def test_the_reference_equals_one_rank(num_ranks, vocab, dtype, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    check_equals_one_rank(num_ranks, vocab, dtype, torch.device("cpu"), filters=False)


def test_no_samples(device):
    arguments = asked(device, filters=True)
    empty = tuple(argument[:0] for argument in arguments[:2]) + arguments[2:]
    tokens = torch.zeros(ROWS, 64, dtype=torch.int32, device=device)
    for ids, _ in sample_in_slices(torch.empty(0, 500, device=device), 2, empty, tokens):
        assert ids.shape == (0,)
