import pytest
import torch

from minisgl.kernels import skinny_matmul as module
from minisgl.kernels.rms_norm import rms_norm_reference
from minisgl.kernels.silu_mul import silu_mul_reference
from minisgl.kernels.skinny_matmul import (
    Stream,
    matmul_into,
    normed_matmul,
    row_borders,
    skinny_matmul,
    skinny_matmul_reference,
    stream_reference,
)
from tests.kernels.matmul_problems import check_chain_of_matmuls, make_problem

HAS_GPU = torch.cuda.is_available()
EPS = 1e-6
MOST_ROWS = 16
# N, K of Qwen3-0.6B and 8B: qkv, o, gate and up, down; and an LM head.
MODEL_SHAPES = [
    (4096, 1024),
    (1024, 2048),
    (6144, 1024),
    (1024, 3072),
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (151936, 1024),
]


def expected(x, weight, bias=None):
    return skinny_matmul_reference(x.double(), weight.double(), bias.double() if bias is not None else None)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize(
    "outputs, inputs", [(1, 63), (63, 64), (1000, 63), (63, 1000), (1, 2048), (100, 3000)] + [(1000, 1000)] * HAS_GPU
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned_output")
def test_matches_float64(device, dtype, assert_close, rows, outputs, inputs, with_bias):
    x, weight, bias = make_problem(rows, outputs, inputs, device, dtype)
    bias = bias if with_bias else None
    assert_close(skinny_matmul(x, weight, bias), expected(x, weight, bias))


@pytest.mark.skipif(not HAS_GPU, reason="large: minutes in the interpreter")
@pytest.mark.parametrize("outputs, inputs", MODEL_SHAPES)
@pytest.mark.usefixtures("poisoned_output")
def test_matches_float64_at_model_shapes(device, assert_close, outputs, inputs):
    x, weight, bias = make_problem(MOST_ROWS, outputs, inputs, device, torch.bfloat16)
    for rows in (1, 2, 5, MOST_ROWS):
        assert_close(skinny_matmul(x[:rows], weight, bias), expected(x[:rows], weight, bias))


@pytest.mark.parametrize("rows", [1, 5])
def test_reads_strided_rows(device, dtype, assert_close, rows):
    wide_x, wide_weight, _ = make_problem(rows, 65, 1500, device, dtype)
    x, weight = wide_x[:, 3:1003], wide_weight[:, 100:1100]
    assert_close(skinny_matmul(x, weight), expected(x, weight))


def test_what_lies_past_the_inputs_stays_out(device, dtype):
    wide_x, wide_weight, _ = make_problem(4, 65, 300, device, dtype)
    clean = [skinny_matmul(wide_x[:rows, :200], wide_weight[:, :200]) for rows in (1, 4)]
    wide_x[:, 200:] = wide_weight[:, 200:] = float("nan")
    for rows, before in zip((1, 4), clean, strict=True):
        assert torch.equal(skinny_matmul(wide_x[:rows, :200], wide_weight[:, :200]), before)


@pytest.mark.parametrize("outputs, inputs", [(63, 1000), *([(4096, 1024), (1024, 2048), (4096, 12288)] * HAS_GPU)])
def test_a_row_does_not_depend_on_its_neighbours_or_their_number(device, dtype, outputs, inputs):
    x, weight, bias = make_problem(MOST_ROWS, outputs, inputs, device, dtype)
    together = skinny_matmul(x, weight, bias)
    for rows in (2, 7, MOST_ROWS - 1):
        assert torch.equal(skinny_matmul(x[:rows], weight, bias), together[:rows])
    x[1:] = float("nan")
    assert torch.equal(skinny_matmul(x, weight, bias)[0], together[0])
    x[0], x[1] = x[1].clone(), x[0].clone()  # nor on its place
    assert torch.equal(skinny_matmul(x[:2], weight, bias)[1], together[0])


@pytest.mark.skipif(not HAS_GPU, reason="needs a stream")
@pytest.mark.parametrize("rows", [1, 4])
def test_waits_for_the_kernels_before_it(rows):
    check_chain_of_matmuls(skinny_matmul, rows)


def make_stream(rows, hidden, device, dtype) -> tuple[Stream, torch.Tensor]:
    """A stream before a norm, and the norm's weight."""
    norm_weight = torch.randn(hidden, device=device, dtype=dtype)
    residual = 3 * torch.randn(rows, hidden, device=device, dtype=dtype)
    stream = stream_reference(residual, norm_weight, EPS)
    thirds = residual.float().square().tensor_split(3, dim=1)
    return stream._replace(squares=torch.stack([part.sum(1) for part in thirds], 1)), norm_weight


def rows_to_test(dtype, device) -> list[int]:
    return [rows for rows in (1, 2, 5, 16, 17, 33, 64, 130, 256) if rows <= row_borders(dtype, device)[-1]]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", [(9, 64), (63, 64), (130, 300), *([(1000, 1024), (3072, 2560)] * HAS_GPU)])
@pytest.mark.usefixtures("poisoned_output")
def test_normed_matmul_is_norm_matmul_and_gate(device, dtype, assert_close, gated, with_bias, outputs, inputs):
    for rows in rows_to_test(dtype, device):
        stream, norm_weight = make_stream(rows, inputs, device, dtype)
        _, weight, bias = make_problem(rows, outputs * (1 + gated), inputs, device, dtype)
        bias = bias if with_bias else None
        y = expected(rms_norm_reference(stream.residual.double(), norm_weight.double(), EPS), weight, bias)
        y = silu_mul_reference(y) if gated else y
        assert_close(normed_matmul(stream, weight, bias, gated=gated), y)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("hidden, inputs", [(9, 64), (63, 64), (130, 300), *([(1024, 2048), (4096, 1024)] * HAS_GPU)])
@pytest.mark.usefixtures("poisoned_output")
def test_matmul_into_adds_and_leaves_what_the_next_norm_needs(device, dtype, assert_close, with_bias, hidden, inputs):
    for rows in rows_to_test(dtype, device):
        stream, norm_weight = make_stream(rows, hidden, device, dtype)
        x, weight, bias = make_problem(rows, hidden, inputs, device, dtype)
        bias = bias if with_bias else None
        residual = stream.residual.double() + expected(x, weight, bias)
        out = matmul_into(stream, x, weight, bias, norm_weight)
        assert out.residual.data_ptr() == stream.residual.data_ptr()
        assert_close(out.residual, residual)
        assert_close(out.scaled, residual * norm_weight.double())
        assert_close(out.squares.sum(1), out.residual.double().square().sum(1))


def test_a_row_of_a_stream_does_not_depend_on_its_neighbours(device, dtype):
    for rows in rows_to_test(dtype, device)[1:]:
        stream, norm_weight = make_stream(rows, 130, device, dtype)
        _, weight, _ = make_problem(rows, 260, 130, device, dtype)
        x, into, _ = make_problem(rows, 130, 70, device, dtype)
        together = normed_matmul(stream, weight, gated=True)
        after = matmul_into(stream._replace(residual=stream.residual.clone()), x, into, None, norm_weight)
        fewer = max(2, rows - 1)
        part = Stream(*(t[:fewer] for t in stream[:3]), EPS)
        if module._rule(fewer, weight) is module._rule(rows, weight):
            assert torch.equal(normed_matmul(part, weight, gated=True), together[:fewer])
        if module._rule(fewer, into) is module._rule(rows, into):
            alone = matmul_into(part, x[:fewer], into, None, norm_weight)
            assert all(torch.equal(a, b[:fewer]) for a, b in zip(alone[:3], after[:3], strict=True))


def test_rules_cover_every_shape_up_to_their_last_row():
    tables = [*module.RULES.values(), module.SAFE_RULES, module.FP32_RULES]
    for rules in tables:
        borders = [rule.max_m for rule in rules]
        assert borders == sorted(borders) and borders[0] == 1
        for max_m in set(borders):
            last = [rule for rule in rules if rule.max_m == max_m][-1]
            assert (last.max_n, last.max_k) == (module.ANY, module.ANY)


def test_no_rows_and_no_outputs(device, dtype):
    x, weight, _ = make_problem(3, 5, 64, device, dtype)
    assert skinny_matmul(x[:0], weight).shape == (0, 5)
    assert skinny_matmul(x, weight[:0]).shape == (3, 0)


@pytest.mark.parametrize(
    "bad, name",
    [
        ("rows", "x"),
        ("x stride", "x"),
        ("x dtype", "x"),
        ("x float64", "x"),
        ("inputs", "weight"),
        ("weight stride", "weight"),
        ("weight dtype", "weight"),
        ("bias shape", "bias"),
        ("bias stride", "bias"),
        ("bias dtype", "bias"),
    ],
)
def test_refuses_bad_arguments(device, bad, name):
    x, weight, bias = make_problem(4, 32, 64, device, torch.float32)
    arguments = {
        "rows": (x.repeat(200, 1), weight, bias),
        "x stride": (x.t().contiguous().t(), weight, bias),
        "x dtype": (x.int(), weight, bias),
        "x float64": (x.double(), weight.double(), bias.double()),
        "inputs": (x, weight[:, :-1], bias),
        "weight stride": (x, weight.t().contiguous().t(), bias),
        "weight dtype": (x, weight.half(), bias),
        "bias shape": (x, weight, bias[:-1]),
        "bias stride": (x, weight, bias.repeat(2)[::2]),
        "bias dtype": (x, weight, bias.half()),
    }
    with pytest.raises(ValueError, match=f"^{name}:"):
        skinny_matmul(*arguments[bad])


@pytest.mark.parametrize("bad", ["stream rows", "stream parts", "stream dtype", "norm_weight", "weight"])
def test_refuses_a_bad_stream(device, bad):
    stream, norm_weight = make_stream(4, 32, device, torch.float32)
    x, weight, _ = make_problem(4, 32, 64, device, torch.float32)
    if bad == "weight":
        with pytest.raises(ValueError, match="^weight: expected an even"):
            normed_matmul(stream, weight[:31, :32], gated=True)
        return
    if bad == "stream rows":
        stream = Stream(stream.residual[:3], stream.scaled[:3], stream.squares[:3], EPS)
    elif bad == "stream parts":
        stream = stream._replace(squares=stream.squares[:3])
    elif bad == "stream dtype":
        stream = stream._replace(scaled=stream.scaled.half())
    else:
        norm_weight = norm_weight[:-1]
    with pytest.raises(ValueError, match=f"^{bad.split()[0]}"):
        matmul_into(stream, x, weight, None, norm_weight)
