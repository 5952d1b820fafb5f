"""Logprobs against float64 log_softmax, and the order of the likeliest against a stable sort."""

import pytest
import torch

from minisgl.kernels import launch
from minisgl.kernels.logprobs import MAX_TOP, logprobs, logprobs_reference
from tests.kernels.sharded_ranks import on_ranks

HAS_GPU = torch.cuda.is_available()
INF = float("inf")


@pytest.fixture(params=[logprobs, logprobs_reference], ids=["kernel", "reference"])
def function(request):
    return request.param


@pytest.mark.parametrize("vocab", [1, 63, 65, 1000, 5003, 151_936])
def test_equal_float64(device, dtype, monkeypatch, function, vocab):
    samples, num_top = (200 if HAS_GPU else 3), min(MAX_TOP, vocab)
    torch.manual_seed(vocab)
    padded = torch.full((samples, vocab + 8), torch.nan, device=device, dtype=dtype)
    logits = padded[:, :vocab]
    logits.copy_(torch.randn(samples, vocab, device=device) * 3)
    ids = torch.randint(vocab, (samples,), dtype=torch.int32, device=device)
    truth = logits.double().log_softmax(-1)
    empty = torch.empty

    def poisoned(*size, **how):
        out = empty(*size, **how)
        return out.fill_(torch.nan if out.is_floating_point() else 123_456_789)

    monkeypatch.setattr(torch, "empty", poisoned)
    of_ids, top_ids, top = function(logits, ids, num_top)
    torch.testing.assert_close(of_ids.double(), truth.gather(1, ids.long()[:, None])[:, 0], rtol=0, atol=1e-5)
    best, order = truth.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_ids.long(), order[:, :num_top])  # with every tie, of which fp16 and bf16 have many
    torch.testing.assert_close(top.double(), best[:, :num_top], rtol=0, atol=1e-5)


def test_ties_go_to_the_smallest_id(device, function):
    logits = torch.zeros(1, 400, device=device)
    logits[0, [301, 70, 100, 65, 3]] = torch.tensor([2.0, 2.0, 2.0, 5.0, 2.0], device=device)
    _, top_ids, _ = function(logits, torch.zeros(1, dtype=torch.int32, device=device), 9)
    assert top_ids.tolist() == [[65, 3, 70, 100, 301, 0, 1, 2, 4]]


def test_masked_and_broken_logits(device, function):
    logits = torch.full((4, 200), -INF, device=device)
    logits[0, [150, 7]] = torch.tensor([1.0, 0.0], device=device)
    logits[1, 3] = torch.nan
    logits[2, 199] = INF
    logits[3, 0] = 5.0
    ids = torch.tensor([7, 3, 199, -1], dtype=torch.int32, device=device)
    of_ids, top_ids, top = function(logits, ids, 3)
    torch.testing.assert_close(of_ids.cpu(), torch.tensor([-1.3132617, -INF, 0.0, -INF]))
    assert top_ids.tolist() == [[150, 7, -1], [-1, -1, -1], [199, -1, -1], [0, -1, -1]]
    torch.testing.assert_close(top[0].cpu(), torch.tensor([-0.3132617, -1.3132617, -INF]))
    assert torch.isneginf(top[1]).all() and top[2].tolist() == [0.0, -INF, -INF]


def test_a_row_does_not_depend_on_the_batch(device, dtype):
    logits = torch.randn(5, 3000, device=device).to(dtype)
    ids = torch.arange(5, dtype=torch.int32, device=device)
    together = logprobs(logits, ids, 5)
    for row in range(5):
        alone = logprobs(logits[row : row + 1], ids[row : row + 1], 5)
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


def test_sizes_of_nothing(device):
    ids = torch.zeros(4, dtype=torch.int32, device=device)
    of_ids, top_ids, top = logprobs(torch.randn(4, 70, device=device), ids)
    assert of_ids.isfinite().all() and top_ids.shape == top.shape == (4, 0)
    assert [x.shape for x in logprobs(torch.randn(0, 70, device=device), ids[:0], 2)] == [(0,), (0, 2), (0, 2)]


@pytest.mark.parametrize("num_top", [0, 5])
@pytest.mark.parametrize("num_ranks, vocab", [(2, 1000), (4, 264), (3, 63)])
def test_ranks_with_a_slice_each_equal_one_rank(device, dtype, num_ranks, vocab, num_top, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(launch, "INTERPRET", False)
    logits = (4 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype).to(device)
    logits[1] = logits[1].round()  # ties
    logits[2, 3:] = -torch.inf  # fewer than num_top
    logits[3] = -torch.inf
    ids = torch.tensor([0, vocab - 1, 5, 7, vocab // 2, 62], dtype=torch.int32, device=device)
    expected, expected_ids, expected_top = logprobs(logits, ids, num_top)
    for of_ids, top_ids, top in on_ranks(logits, num_ranks, lambda s, own: s.logprobs(own, ids, num_top)):
        torch.testing.assert_close(of_ids, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(top_ids, expected_ids)
        torch.testing.assert_close(top, expected_top, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", lambda x: x.double()),
        ("logits", lambda x: x[0]),
        ("ids", lambda x: x.long()),
        ("ids", lambda x: x[:-1]),
        ("num_top", lambda x: 21),
        ("num_top", lambda x: -1),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    arguments = {
        "logits": torch.randn(4, 50, device=device),
        "ids": torch.zeros(4, dtype=torch.int32, device=device),
        "num_top": 5,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}:"):
        logprobs(**arguments)
