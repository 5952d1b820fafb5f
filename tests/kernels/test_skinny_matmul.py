import pytest
import torch

from minisgl.kernels import skinny_matmul as module
from minisgl.kernels.skinny_matmul import MAX_M, matmul, skinny_matmul, skinny_matmul_reference

HAS_GPU = torch.cuda.is_available()
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


@pytest.fixture
def poisoned_output(monkeypatch):
    """What the kernel allocates starts as NaN, so that an element that it leaves out is seen."""

    def empty(*shape, **options):
        return torch.full(shape, float("nan"), **options)

    monkeypatch.setattr(module.torch, "empty", empty)


def make_problem(rows, outputs, inputs, device, dtype):
    """x  # [M, K], weight  # [N, K], bias  # [N], of sums near 1."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    return x, weight, torch.randn(outputs, device=device, dtype=dtype)


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
    x, weight, bias = make_problem(MAX_M, outputs, inputs, device, torch.bfloat16)
    for rows in (1, 2, 5, MAX_M):
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
    x, weight, bias = make_problem(MAX_M, outputs, inputs, device, dtype)
    together = skinny_matmul(x, weight, bias)
    for rows in (2, 7, MAX_M - 1):
        assert torch.equal(skinny_matmul(x[:rows], weight, bias), together[:rows])
    x[1:] = float("nan")
    assert torch.equal(skinny_matmul(x, weight, bias)[0], together[0])
    x[0], x[1] = x[1].clone(), x[0].clone()  # nor on its place
    assert torch.equal(skinny_matmul(x[:2], weight, bias)[1], together[0])


@pytest.mark.skipif(not HAS_GPU, reason="needs a stream")
@pytest.mark.parametrize("rows", [1, 4])
def test_waits_for_the_kernels_before_it(device, rows):
    """A chain through shared buffers, in a graph: a kernel that read or wrote too early would change the result."""
    shapes = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
    weights = [make_problem(1, *shape, device, torch.bfloat16)[1] for shape in shapes * 7]
    start = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
    x = torch.empty_like(start)

    def chain(after_each):
        x.copy_(start)
        y = x
        for weight in weights:
            y = skinny_matmul(y[:, : weight.shape[1]], weight)
            after_each()
        x.copy_(y)

    chain(torch.cuda.synchronize)
    one_by_one = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(x, one_by_one)


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 64])
def test_matmul_takes_any_number_of_rows(device, dtype, assert_close, rows):
    x, weight, bias = make_problem(rows, 96, 128, device, dtype)
    assert_close(matmul(x, weight, bias), expected(x, weight, bias))
    assert_close(matmul(x, weight), expected(x, weight))


def test_rules_cover_every_shape_and_change_with_the_rows_at_the_named_borders_alone():
    tables = [*module.RULES.values(), module.SAFE_RULES, module.FP32_RULES]
    for rules in tables:
        assert {rule.max_m for rule in rules} == {1, MAX_M}
        assert [rule.max_m for rule in rules] == sorted(rule.max_m for rule in rules)
        for max_m in (1, MAX_M):
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
        "rows": (x.repeat(5, 1), weight, bias),
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
