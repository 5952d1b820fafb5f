import pytest
import torch

from minisgl.kernels.embedding import embedding, embedding_reference, embedding_stream


@pytest.mark.parametrize(
    "tokens, vocab, hidden", [(1, 1, 1), (7, 100, 63), (63, 9, 1000), (5, 31, 1029), (2, 50, 4096)]
)
def test_equals_torch(device, dtype, tokens, vocab, hidden):
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype)
    ids = torch.randint(0, vocab, (tokens,), device=device, dtype=torch.int32)
    expected = torch.nn.functional.embedding(ids, weight)
    assert torch.equal(embedding(ids, weight), expected)
    assert torch.equal(embedding_reference(ids, weight), expected)


@pytest.mark.parametrize("tokens, hidden", [(1, 1), (7, 63), (5, 1029), (2, 4096)])
def test_stream_is_the_embedding_and_what_the_first_norm_needs(device, dtype, assert_close, tokens, hidden):
    weight = torch.randn(50, hidden, device=device, dtype=dtype)
    norm_weight = torch.randn(hidden, device=device, dtype=dtype)
    ids = torch.randint(0, 50, (tokens,), device=device, dtype=torch.int32)
    stream = embedding_stream(ids, weight, norm_weight, 1e-6)
    assert torch.equal(stream.residual, weight[ids.long()])
    assert_close(stream.scaled, stream.residual.double() * norm_weight.double())
    assert_close(stream.squares.sum(1), stream.residual.double().square().sum(1))


def test_unknown_ids_give_zeros(device, dtype):
    weight = torch.randn(10, 33, device=device, dtype=dtype)
    ids = torch.tensor([-1, 10, 2**31 - 1, -(2**31), 9, 0], device=device, dtype=torch.int32)
    out = embedding(ids, weight)
    assert (out[:4] == 0).all()
    assert torch.equal(out[4:], weight[[9, 0]])
    assert torch.equal(out, embedding_reference(ids, weight))


def test_slices_of_a_table_add_up(device, dtype):
    weight = torch.randn(70, 33, device=device, dtype=dtype)
    ids = torch.tensor([0, 63, 64, 69, 70, -1], device=device, dtype=torch.int32)
    parts = [embedding(ids, weight[:64]), embedding(ids, weight[64:], 64)]
    assert torch.equal(sum(parts), embedding(ids, weight))
    assert torch.equal(parts[1], embedding_reference(ids, weight[64:], 64))


def test_reads_a_strided_table_and_writes_every_value(device, dtype, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    table = torch.full((10, 300), torch.nan, device=device, dtype=dtype)
    table[:, :200] = torch.randn(10, 200, device=device).to(dtype)
    ids = torch.arange(-1, 11, device=device, dtype=torch.int32)
    out = embedding(ids, table[:, :200])
    assert torch.equal(out[1:11], table[:, :200]) and (out[[0, 11]] == 0).all()


def test_no_tokens(device, dtype):
    ids = torch.empty(0, device=device, dtype=torch.int32)
    assert embedding(ids, torch.ones(4, 64, device=device, dtype=dtype)).shape == (0, 64)


@pytest.mark.parametrize(
    "ids, weight, name",
    [
        (torch.zeros(3, dtype=torch.int64), torch.ones(4, 8), "ids"),
        (torch.zeros(3, 1, dtype=torch.int32), torch.ones(4, 8), "ids"),
        (torch.zeros(6, dtype=torch.int32)[::2], torch.ones(4, 8), "ids"),
        (torch.zeros(3, dtype=torch.int32), torch.ones(8), "weight"),
        (torch.zeros(3, dtype=torch.int32), torch.ones(8, 4).t(), "weight"),
    ],
)
def test_refuses_bad_arguments(ids, weight, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        embedding(ids, weight)
