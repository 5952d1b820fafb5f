from itertools import product

import pytest
import torch

from minisgl.kernels import prefill_matmul_sm90 as module
from minisgl.kernels.matmul_sm90 import MAX_ROWS
from minisgl.kernels.prefill_matmul_sm90 import fewest_rows, fits_gated, fits_heads, gated_matmul, heads_matmul
from minisgl.kernels.rms_norm import rms_norm
from minisgl.kernels.rotary import rotary_store_reference
from minisgl.kernels.silu_mul import silu_mul_reference
from tests.kernels import test_rotary as rotary_problems
from tests.kernels.matmul_problems import check_chain, make_problem, needs_sm90

ROWS = (128, 129, 300, 3000)  # of the last a program has several tiles
HEADS = ((16, 8, 128), (2, 1, 128), (14, 2, 64))  # query heads, KV heads, head dim
every_kind_of_heads = pytest.mark.parametrize(
    "shape, with_norm, with_bias", list(product(HEADS, (False, True), (False, True)))
)


def make_heads(rows, shape, inputs, dtype=torch.bfloat16, device="cuda", with_norm=True):
    """Arguments of heads_matmul; from the positions on those of rotary_store."""
    _, *stored = rotary_problems.make(rows, *shape, device, dtype, with_norm)
    heads, kv_heads, head_dim = shape
    return *make_problem(rows, (heads + 2 * kv_heads) * head_dim, inputs, device, dtype), *stored


def heads_in_float64(x, weight, bias, *stored):
    qkv = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    args = rotary_problems.in_float64((qkv, *stored))
    return rotary_store_reference(*args), *args[3:5]


def assert_stored(assert_close, cache, expected):
    assert torch.equal(cache.isnan(), expected.isnan())  # where there is no slot, nothing is written
    assert_close(cache.nan_to_num(), expected.nan_to_num())


def check_heads(launcher, assert_close, rows, shape, with_norm, with_bias):
    x, weight, bias, *stored = make_heads(rows, shape, 1000, with_norm=with_norm)
    bias = bias if with_bias else None
    expected, k_cache, v_cache = heads_in_float64(x, weight, bias, *stored)
    assert_close(launcher(x, weight, bias, *stored), expected)
    assert_stored(assert_close, stored[2], k_cache)
    assert_stored(assert_close, stored[3], v_cache)


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs, inputs", [(3072, 1024), (328, 1000), (128, 72)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned_output")
def test_gated_matches_float64(assert_close, rows, outputs, inputs, with_bias):
    x, weight, bias = make_problem(rows, 2 * outputs, inputs, "cuda", torch.bfloat16)
    y = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_close(gated_matmul(x, weight, bias if with_bias else None), silu_mul_reference(y))


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("rows", ROWS)
@every_kind_of_heads
@pytest.mark.usefixtures("poisoned_output")
def test_heads_match_float64(assert_close, rows, shape, with_norm, with_bias):
    check_heads(heads_matmul, assert_close, rows, shape, with_norm, with_bias)


@pytest.mark.gpu
@needs_sm90
def test_float16_and_rows_of_larger_matrices(assert_close):
    wide_x, wide_weight, _ = make_problem(300, 640, 1536, "cuda", torch.float16)
    x, weight = wide_x[:, 8:1032], wide_weight[:, 512:]
    assert_close(gated_matmul(x, weight, None), silu_mul_reference(x.double() @ weight.double().t()))
    wide_x, wide_weight, _, *stored = make_heads(300, HEADS[0], 1536, torch.float16)
    x, weight = wide_x[:, 8:1032], wide_weight[:, 512:]
    assert_close(heads_matmul(x, weight, None, *stored), heads_in_float64(x, weight, None, *stored)[0])


@pytest.mark.gpu
@needs_sm90
def test_a_row_reads_no_other():
    x, weight, _, *stored = make_heads(500, HEADS[0], 512)
    stored[1] = torch.full_like(stored[1], -1)
    clean = gated_matmul(x, weight, None), heads_matmul(x, weight, None, *stored)
    x[1::2] = float("nan")
    with_nan = gated_matmul(x, weight, None), heads_matmul(x, weight, None, *stored)
    for y, expected in zip(with_nan, clean, strict=True):
        assert torch.equal(y[::2], expected[::2])


@pytest.mark.gpu
@needs_sm90
def test_waits_for_the_kernels_before_it():
    rows, hidden, dtype = 600, 1024, torch.bfloat16
    x, qkv, _, *stored = make_heads(rows, HEADS[0], hidden)
    layers = [(make_problem(1, 6144, hidden, "cuda", dtype)[1], make_problem(1, hidden, 5120, "cuda", dtype)[1])] * 6
    norm = torch.ones(hidden, dtype=dtype, device="cuda")
    residual, out = torch.empty_like(x), torch.empty_like(x)

    def chain(after_each):
        residual.copy_(x)
        y = rms_norm(residual, norm, 1e-6)
        for gate_up, down in layers:
            q = heads_matmul(y, qkv, None, *stored)
            after_each()
            gated = gated_matmul(y, gate_up, None)
            after_each()
            y = torch.cat((q.flatten(1), gated), 1) @ down.t()
            after_each()
            y = rms_norm(y, norm, 1e-6, residual)
            after_each()
        out.copy_(y)

    check_chain(chain, out)


def test_which_shapes(monkeypatch):
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)

    def gated(rows, outputs, inputs=64, dtype=torch.bfloat16, skip=0):
        x = torch.empty(rows, inputs + skip, dtype=dtype)[:, skip:]
        return fits_gated(x, torch.empty(2 * outputs, inputs, dtype=dtype))

    def heads(rows, heads, kv_heads, head_dim):
        x, weight = torch.empty(rows, 64).half(), torch.empty((heads + 2 * kv_heads) * head_dim, 64).half()
        return fits_heads(x, weight, torch.empty(1, 16, kv_heads, head_dim).half())

    assert gated(8448, 3072) and gated(8448, 12288) and gated(2048, 3072) and gated(2000, 3072, dtype=torch.float16)
    assert not gated(8448, 3072, dtype=torch.float32)
    assert not gated(8448, 3072, skip=1)  # TMA needs 16 bytes
    assert not gated(8448, 3076)  # pairs of 8 rows
    assert not gated(1500, 3072)  # 288 tiles in three turns of 132
    assert not gated(MAX_ROWS, 12672)  # matmul_sm90 is for so few
    assert not gated(1 << 20, 120)  # less than a tile
    assert heads(8448, 16, 8, 128) and heads(8448, 32, 8, 64) and heads(1024, 16, 8, 128)
    assert not heads(8448, 32, 8, 80)
    assert not heads(8448, 15, 1, 64)  # a tile's half would have keys and values
    assert not heads(512, 16, 8, 128)


def test_the_rows_at_which_all_of_them_run(monkeypatch):
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    qkv, gate_up, cache = torch.empty(4096, 64).half(), torch.empty(6144, 64).half(), torch.empty(1, 16, 8, 128).half()
    x = torch.empty(3000, 64).half()
    for most in (200, 256, 512, 1000, 1024, 2000, 3000):
        steps = [x[:rows] for rows in range(1, most + 1)]
        run = [x[:rows] for rows in fewest_rows(qkv, gate_up, most)]
        for fits in (lambda x: fits_heads(x, qkv, cache), lambda x: fits_gated(x, gate_up)):
            assert any(map(fits, steps)) == any(map(fits, run))


def change_of_each_argument():
    """Its name, and a change of the arguments of heads_matmul that makes it wrong."""
    return [
        ("weight", lambda a: a.update(weight=a["weight"][:, :-8])),
        ("weight", lambda a: a.update(weight=a["weight"].half())),
        ("weight", lambda a: a.update(weight=a["weight"][:256], bias=None)),
        ("bias", lambda a: a.update(bias=a["bias"][1:])),
        ("positions", lambda a: a.update(positions=a["positions"][1:])),
        ("slots", lambda a: a.update(slots=a["slots"].long())),
        ("k_cache", lambda a: a.update(k_cache=a["k_cache"].float())),
        ("v_cache", lambda a: a.update(v_cache=a["v_cache"][:1])),
        ("k_norm", lambda a: a.update(rotary=a["rotary"]._replace(k_norm=None))),
    ]


@pytest.mark.parametrize("name, change", [("x", lambda a: a.update(x=a["x"][:127])), *change_of_each_argument()])
def test_refuses_bad_arguments(name, change):
    names = ("x", "weight", "bias", "positions", "slots", "k_cache", "v_cache", "rotary")
    arguments = dict(zip(names, make_heads(128, HEADS[1], 64, device="cpu"), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        heads_matmul(**arguments)
