import pytest
import torch

from minisgl.kernels import invariant_matmul as module
from minisgl.kernels import launch
from minisgl.kernels.invariant_matmul import invariant_matmul, invariant_matmul_reference, split_inputs
from tests.kernels.matmul_problems import check_chain_of_matmuls, make_problem
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)

HAS_GPU = torch.cuda.is_available()
# N, K of Qwen3-0.6B and 8B: qkv, o, gate and up, down; and an LM head.
MODEL_SHAPES = [
    (4096, 1024),
    (1024, 2048),
    (1024, 3072),
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (151936, 1024),
]


@pytest.fixture(autouse=True)
def poisoned_output(monkeypatch):
    """What is allocated starts as NaN, so that an element that a kernel leaves out is seen."""

    def empty(*shape, **options):
        return torch.full(shape, float("nan"), **options)

    monkeypatch.setattr(module.torch, "empty", empty)


@pytest.fixture
def small_splits(monkeypatch):
    """Splits of a hundred inputs, for matrices that the interpreter can do."""
    monkeypatch.setattr(module, "MIN_SPLIT", 64)
    monkeypatch.setattr(module, "SPLIT_STEP", 256 if HAS_GPU else 32)


def expected(x, weight, bias=None):
    return x.double() @ weight.double().t() + (0 if bias is None else bias.double())


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("outputs, inputs", [(1, 63), (40, 64), (33, 250)] + [(1000, 1000), (1000, 1001)] * HAS_GPU)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("small_splits")
def test_matches_float64(device, dtype, assert_close, rows, outputs, inputs, with_bias):
    x, weight, bias = make_problem(rows, outputs, inputs, device, dtype)
    bias = bias if with_bias else None
    assert_close(invariant_matmul(x, weight, bias), expected(x, weight, bias))


@pytest.mark.parametrize("inputs", [63, 600])  # one split, and three or more
@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_a_row_is_the_same_in_any_company(device, dtype, inputs):
    """Alone, with few, whose splits run at once, and with many, whose splits run one after another."""
    x, weight, bias = make_problem(40, 17, inputs, device, dtype)
    together = invariant_matmul(x, weight, bias)
    for rows in (1, 16):
        assert torch.equal(invariant_matmul(x[:rows], weight, bias), together[:rows])
        assert torch.equal(invariant_matmul(x[-rows:], weight, bias), together[-rows:])
    x[1:] = float("nan")
    assert torch.equal(invariant_matmul(x, weight, bias)[0], together[0])


def test_the_reference_is_invariant_too(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    x, weight, bias = make_problem(40, 33, 256, torch.device("cpu"), torch.float32)
    together = invariant_matmul(x, weight, bias)
    torch.testing.assert_close(together, torch.nn.functional.linear(x, weight, bias))
    for rows in (1, 7):
        assert torch.equal(invariant_matmul(x[-rows:], weight, bias), together[-rows:])
    assert invariant_matmul_reference(x[:0], weight).shape == (0, 33)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_reads_strided_rows(device, dtype, assert_close, rows):
    """Whose memory suits a descriptor, and whose does not; and what lies beside it stays out."""
    wide_x, wide_weight, _ = make_problem(rows, 35, 304, device, dtype)
    for first in (16, 3):
        x, weight = (wide[:, first : first + 200].clone() for wide in (wide_x, wide_weight))
        inside_x, inside_weight = torch.full_like(wide_x, float("nan")), torch.full_like(wide_weight, float("nan"))
        inside_x[:, first : first + 200], inside_weight[:, first : first + 200] = x, weight
        y = invariant_matmul(inside_x[:, first : first + 200], inside_weight[:, first : first + 200])
        assert_close(y, expected(x, weight))
        assert torch.equal(y, invariant_matmul(x, weight))


def test_nothing_to_do(device, dtype):
    x, weight, _ = make_problem(3, 5, 64, device, dtype)
    assert invariant_matmul(x[:0], weight).shape == (0, 5)
    assert invariant_matmul(x, weight[:0]).shape == (3, 0)


def test_splits_are_whole_blocks_of_every_tile():
    for outputs, inputs in [*MODEL_SHAPES, (1, 1), (64, 100_000), (5120, 17408)]:
        split = split_inputs(outputs, inputs)
        assert split % module.SPLIT_STEP == 0
        assert split >= min(inputs, module.MIN_SPLIT)
    for tiles in (*module.TILES.values(), module.SAFE_TILES, module.FP32_TILES):
        assert all(module.SPLIT_STEP % tile.block_k == 0 for tile in tiles.values())
        assert (module.ANY, module.ANY) in tiles


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", lambda a: a.update(x=a["x"][0])),
        ("x", lambda a: a.update(x=a["x"][:, :0])),
        ("x", lambda a: a.update(x=a["x"].t())),
        ("x", lambda a: a.update(x=a["x"].double())),
        ("weight", lambda a: a.update(weight=a["weight"][:, :-1])),
        ("weight", lambda a: a.update(weight=a["weight"].half())),
        ("bias", lambda a: a.update(bias=a["bias"][:-1])),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    arguments = dict(zip(("x", "weight", "bias"), make_problem(3, 4, 32, device, torch.float32), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        invariant_matmul(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("outputs, inputs", MODEL_SHAPES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_tile_gives_the_same_rows(device, assert_close, outputs, inputs, kind):
    """What rests on the hardware: no size of an instruction, and no place in it, changes a row."""
    x, weight, bias = make_problem(8192 if outputs < 100_000 else 600, outputs, inputs, device, kind)
    together = invariant_matmul(x, weight, bias)
    assert_close(together[:300], expected(x[:300], weight, bias))
    for rows in (1, 2, 15, 16, 17, 32, 33, 64, 65, 100, 128, 129, 256, 257, 500, 1024, 1025, 3000):
        if rows <= len(x):
            for start in {0, 3, len(x) - rows}:
                part = slice(start, start + rows)
                if part.stop <= len(x):
                    assert torch.equal(invariant_matmul(x[part], weight, bias), together[part]), f"{rows} at {start}"


@pytest.mark.gpu
def test_numbers_of_very_different_size(device):
    """Long mantissas that cancel: an order of the sum that changes shows at once."""
    x, weight, _ = make_problem(2000, 4096, 4096, device, torch.bfloat16)
    x *= torch.exp2(torch.randint(-12, 12, x.shape, device=device))
    together = invariant_matmul(x, weight)
    for rows in (1, 16, 40, 64, 128, 200, 700):
        assert torch.equal(invariant_matmul(x[:rows], weight), together[:rows])
        assert torch.equal(invariant_matmul(x[-rows:], weight), together[-rows:])


@pytest.mark.gpu
def test_waits_for_the_kernels_before_it():
    check_chain_of_matmuls(invariant_matmul, 4)
