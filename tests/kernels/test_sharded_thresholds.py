"""Ranks that each have a slice of the logits keep the tokens that filters of all kinds keep of them all on one rank."""

import pytest
import torch

from minisgl.kernels import launch
from tests.kernels.sharded_ranks import check_equals_one_rank

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("num_ranks, vocab", [(2, 1000), (4, 264)] + [(4, 151_936)] * HAS_GPU)
def test_equals_one_rank(num_ranks, vocab, dtype, device):
    check_equals_one_rank(num_ranks, vocab, dtype, device, filters=True)


@pytest.mark.parametrize("num_ranks, vocab", [(2, 1000), (4, 5000), (8, 264), (3, 63)])
def test_the_reference_equals_one_rank(num_ranks, vocab, dtype, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    check_equals_one_rank(num_ranks, vocab, dtype, torch.device("cpu"), filters=True)
