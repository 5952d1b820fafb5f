"""Several ranks on a CPU give what one gives, for every family and where nothing divides evenly."""

import pytest
import torch

from minisgl.parallel import ParallelGroup
from tests.rank_scripts import answers_of
from tests.ranks import run_ranks
from tests.tiny_models import NAMES, make

SIZES = [2, 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make(name, root / name) for name in NAMES]


@pytest.fixture(scope="module", params=SIZES)
def answers(request, folders, tmp_path_factory):
    """Of each rank, {model: its answers}."""
    return run_ranks("answers", request.param, tmp_path_factory.mktemp("ranks"), *folders)


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_rank(name, folders, answers):
    expected = answers_of(folders[NAMES.index(name)])
    logits = torch.cat([of_rank[name]["logits"] for of_rank in answers], dim=1)
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-4)  # another order of the sums
    for of_rank in answers:
        assert of_rank[name]["ids"] == expected["ids"]


@pytest.mark.parametrize("group_size", [2, 4])
def test_exchanges(tmp_path, group_size):
    of_ranks = run_ranks("exchange", 4, tmp_path, group_size)
    for rank, found in enumerate(of_ranks):
        first = rank // group_size * group_size
        members = range(first, first + group_size)
        assert found["rank"] == (rank - first, group_size)
        assert found["gather"].tolist() == [[member] for member in members]
        assert found["min"] == 100 - members[-1]
        long = bytes([first]) * 10_000
        sent = [b"plan" * (first + 1), long, b"", long[:4088], long[:4089]]
        assert found["sends"] == [message.hex() for message in sent]
        total = torch.tensor([[1.5, -2.0]]) * sum(member + 1 for member in members)
        assert torch.equal(found["sum"], total)
        assert torch.equal(found["residual"], torch.tensor([[10.0, 20.0]]) + total)
        normed = found["residual"] / found["residual"].square().mean().sqrt()
        torch.testing.assert_close(found["normed"], normed)
        if rank == 0:
            own, gathered, _ = found["rehearsed"]
            assert own.shape == (1, 2) and torch.equal(gathered, own.expand(group_size, 1, 2))
        assert torch.equal(found["ordered"], sum(of_ranks[member]["terms"] for member in members))  # one after another


def test_one_rank_alone():
    group, x = ParallelGroup(), torch.ones(2, 3)
    with group.rehearsal():
        assert group.sum(x) is x
    assert group.sum(x) is x and group.gather(x).shape == (1, 2, 3)
    assert (group.ranks, group.min(3), group.send(b"x")) == ((0, 1), 3, b"x")


def test_a_rank_that_fails_ends_all(tmp_path):
    with pytest.raises(AssertionError, match="(?s)rank 1 ended with 1.*ZeroDivisionError"):
        run_ranks("fail", 2, tmp_path, timeout_s=60)
