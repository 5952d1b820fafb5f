"""Block summaries against float64, at odd sizes, with poisoned outputs."""

import pytest
import torch

from minisgl.kernels.vocab_blocks import (
    BLOCK,
    Shape,
    blocks_reference,
    summarize_blocks,
    summarize_blocks_reference,
)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 4097])
def test_summaries_equal_float64(device, dtype, monkeypatch, vocab):
    torch.manual_seed(vocab)
    padded = torch.full((5, vocab + 7), torch.nan, device=device, dtype=dtype)
    logits = padded[:, :vocab]
    logits.copy_(torch.randn(5, vocab, device=device) * 3)
    rows = torch.tensor([2, 0, -1, 1, 2], dtype=torch.int32, device=device)
    temperature = torch.tensor([1.0, 0.3, 7.0], device=device)
    blocks = blocks_reference(logits.double())
    scaled = blocks / temperature[rows.clamp_min(0)].double()[:, None, None]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    for function in (summarize_blocks, summarize_blocks_reference):
        largest, mass = function(logits, rows, temperature)
        assert largest.shape == mass.shape == (5, Shape.of(logits).blocks) == (5, -(-vocab // BLOCK))
        assert torch.equal(largest.double(), blocks.amax(-1))
        expected = torch.exp(scaled - scaled.amax(-1, keepdim=True)).sum(-1)
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", [summarize_blocks, summarize_blocks_reference])
def test_broken_logits(device, function):
    inf, rows, temperature = (
        float("inf"),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.ones(1, device=device),
    )
    logits = torch.full((1, 4 * BLOCK), -inf, device=device)
    logits[0, BLOCK : BLOCK + 2] = torch.nan
    logits[0, BLOCK + 5] = 2.0
    logits[0, 2 * BLOCK : 2 * BLOCK + 2] = inf
    logits[0, 3 * BLOCK] = -torch.finfo(torch.float32).max
    largest, mass = function(logits, rows, temperature)
    highest = torch.finfo(torch.float32).max
    assert largest.tolist() == [[-inf, 2.0, highest, -highest]]
    assert mass.tolist() == [[0.0, 1.0, 2.0, 1.0]]


@pytest.mark.parametrize("function", [summarize_blocks, summarize_blocks_reference])
@pytest.mark.parametrize("vocab", [0, 1, 64, 100, 192])
def test_padding_counts_for_nothing(device, dtype, function, vocab):
    logits = torch.randn(3, 3 * BLOCK, device=device).to(dtype)
    largest, mass = function(logits, vocab=vocab)
    logits[:, vocab:] = -torch.inf
    expected_largest, expected_mass = function(logits)
    assert torch.equal(largest, expected_largest)
    assert torch.equal(mass, expected_mass)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", lambda x: x.double()),
        ("logits", lambda x: x.t().contiguous().t()),
        ("rows", lambda x: x.long()),
        ("rows", lambda x: x[:-1]),
        ("temperature", lambda x: x[:, None]),
        ("temperature", lambda x: x.double()),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    arguments = {
        "logits": torch.randn(4, 20, device=device),
        "rows": torch.zeros(4, dtype=torch.int32, device=device),
        "temperature": torch.ones(3, device=device),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}:"):
        summarize_blocks(**arguments)
