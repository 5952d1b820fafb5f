import pytest
import torch

from minisgl.kernels.silu_mul import silu_mul, silu_mul_reference


@pytest.mark.parametrize("tokens, intermediate", [(1, 1), (3, 63), (63, 100), (5, 1000), (2, 3072)])
def test_matches_float64(device, dtype, assert_close, tokens, intermediate):
    x = torch.randn(tokens, 2 * intermediate, device=device, dtype=dtype) * 4
    assert_close(silu_mul(x), silu_mul_reference(x.double()))


def test_matches_torch_at_extremes(device, dtype):
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]], device=device, dtype=dtype)
    up = torch.full_like(gate, 2.0)
    out = silu_mul(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)


def test_reads_a_strided_view(device, dtype):
    x = torch.full((7, 250), torch.nan, device=device, dtype=dtype)
    x[:, :200] = torch.randn(7, 200, device=device).to(dtype)
    out = silu_mul(x[:, :200])
    assert out.is_contiguous() and torch.equal(out, silu_mul(x[:, :200].contiguous()))


def test_writes_every_value(device, dtype, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    assert silu_mul(torch.randn(3, 2 * 1029, device=device, dtype=dtype)).isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours(device, dtype):
    x = torch.randn(33, 1030, device=device, dtype=dtype)
    together = silu_mul(x)
    for row in range(0, 33, 8):
        assert torch.equal(together[row : row + 1], silu_mul(x[row : row + 1]))


def test_a_value_of_the_reference_does_not_depend_on_its_place():
    x = torch.randn(300, 2 * 1003) * 4
    together = silu_mul_reference(x)
    for column in (0, 500, 1002):
        assert torch.equal(together[:, column : column + 1], silu_mul_reference(x[:, [column, 1003 + column]]))


def test_no_tokens(device, dtype):
    assert silu_mul(torch.empty(0, 64, device=device, dtype=dtype)).shape == (0, 32)


@pytest.mark.parametrize("x", [torch.ones(4, 5), torch.ones(8), torch.ones(64, 4).t(), torch.ones(4, 4).int()])
def test_refuses_bad_arguments(x):
    with pytest.raises(ValueError, match="^x:"):
        silu_mul(x)
