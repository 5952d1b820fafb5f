import pytest
import torch

from minisgl.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("tokens, hidden", [(1, 64), (3, 1000), (63, 63), (5, 4096)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_float64(device, dtype, assert_close, tokens, hidden, with_residual):
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.randn(hidden, device=device, dtype=dtype)
    residual = torch.randn_like(x) if with_residual else None
    residual64 = residual.double() if residual is not None else None

    expected = rms_norm_reference(x.double(), weight.double(), 1e-6, residual64)
    out = rms_norm(x, weight, 1e-6, residual)

    assert_close(out, expected)
    if residual is not None:
        assert_close(residual, residual64)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("with_residual", [False, True])
def test_adds_the_parts_of_a_matmul(device, dtype, assert_close, parts, with_residual):
    x = torch.randn(parts, 7, 300, device=device, dtype=dtype)
    weight = torch.randn(300, device=device, dtype=dtype)
    residual = torch.randn(7, 300, device=device, dtype=dtype) if with_residual else None
    residual64 = residual.double() if residual is not None else None

    expected = rms_norm_reference(x.double(), weight.double(), 1e-6, residual64)
    out = rms_norm(x, weight, 1e-6, residual)

    assert out.dtype == dtype
    assert_close(out, expected)
    if residual is not None:
        assert_close(residual, residual64)


def test_reads_a_strided_view(device, dtype, assert_close):
    x = torch.randn(7, 200, device=device, dtype=dtype)[:, :100]
    weight = torch.randn(100, device=device, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x.double(), weight.double(), 1e-5))


def test_a_row_does_not_depend_on_its_neighbours(device, dtype):
    x = torch.randn(33, 512, device=device, dtype=dtype)
    weight = torch.randn(512, device=device, dtype=dtype)
    together = rms_norm(x, weight, 1e-6)
    for row in range(0, 33, 8):
        assert torch.equal(together[row : row + 1], rms_norm(x[row : row + 1], weight, 1e-6))


def test_no_tokens(device, dtype):
    assert rms_norm(
        torch.empty(0, 64, device=device, dtype=dtype), torch.ones(64, device=device, dtype=dtype), 1e-6
    ).shape == (0, 64)


@pytest.mark.parametrize(
    "bad, name",
    [("shape", "weight"), ("dtype", "x"), ("stride", "x"), ("one part", "x"), ("parts", "x"), ("residual", "residual")],
)
def test_refuses_bad_arguments(device, bad, name):
    x, weight, residual = torch.randn(4, 64, device=device), torch.ones(64, device=device), None
    if bad == "shape":
        weight = weight[:-1]
    elif bad == "dtype":
        weight = weight.half()
    elif bad == "one part":
        x = x[None]
    elif bad == "parts":
        x = torch.randn(4, 2, 64, device=device).transpose(0, 1)
    elif bad == "stride":
        x = torch.randn(64, 4, device=device).t()
    else:
        residual = torch.randn(5, 64, device=device)
    with pytest.raises(ValueError, match=f"^{name}:"):
        rms_norm(x, weight, 1e-6, residual)
