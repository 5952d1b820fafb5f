import pytest
import torch

from minisgl.kernels import heads_matmul_sm90 as module
from minisgl.kernels.heads_matmul_sm90 import fits_heads, heads_matmul
from minisgl.kernels.matmul_sm90 import MAX_ROWS, MIN_ROWS
from minisgl.kernels.rms_norm import rms_norm
from tests.kernels.matmul_problems import check_chain, make_problem, needs_sm90
from tests.kernels.test_prefill_matmul_sm90 import (
    HEADS,
    change_of_each_argument,
    check_heads,
    every_kind_of_heads,
    heads_in_float64,
    make_heads,
)


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("rows", [MIN_ROWS, 33, 64, 100, 193, MAX_ROWS])
@every_kind_of_heads
@pytest.mark.usefixtures("poisoned_output")
def test_matches_float64(assert_close, rows, shape, with_norm, with_bias):
    check_heads(heads_matmul, assert_close, rows, shape, with_norm, with_bias)


@pytest.mark.gpu
@needs_sm90
@pytest.mark.usefixtures("poisoned_output")
def test_float16_rows_of_larger_matrices_and_few_inputs(assert_close):
    wide_x, wide_weight, _, *stored = make_heads(50, HEADS[0], 1536, torch.float16)
    for inputs in (1024, 72):
        x, weight = wide_x[:, 8 : 8 + inputs], wide_weight[:, 512 : 512 + inputs]
        assert_close(heads_matmul(x, weight, None, *stored), heads_in_float64(x, weight, None, *stored)[0])


@pytest.mark.gpu
@needs_sm90
def test_a_row_reads_no_other():
    x, weight, _, *stored = make_heads(200, HEADS[0], 512)
    stored[1] = torch.full_like(stored[1], -1)
    clean = heads_matmul(x, weight, None, *stored)
    x[1::2] = float("nan")
    assert torch.equal(heads_matmul(x, weight, None, *stored)[::2], clean[::2])


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("rows", [32, 64, 250])
def test_waits_for_the_kernels_before_it(rows):
    hidden, dtype = 1024, torch.bfloat16
    x, qkv, _, *stored = make_heads(rows, HEADS[0], hidden)
    layers = [make_problem(1, hidden, 2048, "cuda", dtype)[1] for _ in range(12)]
    norm = torch.ones(hidden, dtype=dtype, device="cuda")
    residual, out = torch.empty_like(x), torch.empty_like(x)

    def chain(after_each):
        residual.copy_(x)
        y = rms_norm(residual, norm, 1e-6)
        for o in layers:
            q = heads_matmul(y, qkv, None, *stored)
            after_each()
            y = q.flatten(1) @ o.t()
            after_each()
            y = rms_norm(y, norm, 1e-6, residual)
            after_each()
        out.copy_(y)

    check_chain(chain, out)


def test_which_shapes(monkeypatch):
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)

    def fits(rows, heads, kv_heads, head_dim, inputs=1024, dtype=torch.bfloat16, skip=0):
        x = torch.empty(rows, inputs + skip, dtype=dtype)[:, skip:]
        weight = torch.empty((heads + 2 * kv_heads) * head_dim, inputs, dtype=dtype)
        return fits_heads(x, weight, torch.empty(1, 16, kv_heads, head_dim))

    assert [rows for rows in range(0, 300, 32) if fits(rows, 16, 8, 128)] == [32, 64, 160, 192, 224, 256]
    assert [rows for rows in range(0, 300, 32) if fits(rows, 32, 8, 128, 4096)] == [96, 128]
    assert [rows for rows in range(0, 300, 32) if fits(rows, 40, 8, 128, 5120)] == [96, 128]
    assert fits(64, 14, 2, 64) and fits(64, 16, 8, 128, dtype=torch.float16)
    assert not fits(64, 16, 8, 128, dtype=torch.float32)
    assert not fits(64, 16, 8, 128, skip=1)  # TMA needs 16 bytes
    assert not fits(64, 32, 8, 80)
    assert not fits(64, 15, 1, 64)  # a tile would have keys and values


@pytest.mark.parametrize("name, change", [("x", lambda a: a.update(x=a["x"][:31])), *change_of_each_argument()])
def test_refuses_bad_arguments(name, change):
    names = ("x", "weight", "bias", "positions", "slots", "k_cache", "v_cache", "rotary")
    arguments = dict(zip(names, make_heads(128, HEADS[1], 64, device="cpu"), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        heads_matmul(**arguments)
