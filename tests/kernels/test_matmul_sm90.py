import pytest
import torch

from minisgl.kernels import matmul_sm90 as module
from minisgl.kernels.matmul_sm90 import (
    ANY,
    GATED,
    MAX_ROWS,
    MIN_ROWS,
    PARTS,
    TILES,
    WHOLE,
    find_tile,
    grid,
    matmul_sm90,
    matmul_sm90_reference,
    row_borders,
)
from minisgl.kernels.rms_norm import rms_norm
from tests.kernels import matmul_problems
from tests.kernels.matmul_problems import check_chain, needs_sm90

EACH_TILE = [(*bucket, tile) for bucket, tile in TILES["sm_90"].items()]
each_tile = pytest.mark.parametrize(
    "kind, most_rows, most_outputs, tile", EACH_TILE, ids=["-".join(map(str, bucket)) for bucket in TILES["sm_90"]]
)


def make_problem(rows, outputs, inputs, kind, dtype=torch.bfloat16, device="cuda"):
    return matmul_problems.make_problem(rows, outputs * (1 + (kind == GATED)), inputs, device, dtype)


def expected(x, weight, bias, kind):
    return matmul_sm90_reference(x.double(), weight.double(), None if bias is None else bias.double(), kind)


def whole(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return y.sum(0, dtype=torch.float32).to(dtype) if y.dim() == 3 else y


@pytest.mark.gpu
@needs_sm90
@each_tile
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned_output")
def test_matches_float64(assert_close, kind, most_rows, most_outputs, tile, with_bias):
    fewest = max(border for border in row_borders() if border < most_rows) + 1
    for rows in {fewest, (fewest + most_rows) // 2, most_rows}:
        for outputs, inputs in ((min(most_outputs, 5120), 2048), (328, 1000), (40, 72)):
            x, weight, bias = make_problem(rows, outputs, inputs, kind)
            bias = bias if with_bias else None
            y = matmul_sm90(x, weight, bias, tile, kind)
            assert (y.dim() == 3) == (kind == PARTS and inputs >= 1000)
            assert_close(whole(y, x.dtype), expected(x, weight, bias, kind))


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("kind", [WHOLE, GATED, PARTS])
def test_float16_and_rows_of_larger_matrices(assert_close, kind):
    for rows in (32, 50, 64):
        wide_x, wide_weight, _ = make_problem(rows, 640, 1536, kind, torch.float16)
        x, weight = wide_x[:, 8:1032], wide_weight[:, 512:]
        tile = find_tile(x, weight, kind if kind != WHOLE else PARTS)
        assert_close(whole(matmul_sm90(x, weight, None, tile, kind), x.dtype), expected(x, weight, None, kind))


@pytest.mark.gpu
@needs_sm90
@each_tile
def test_a_row_reads_no_other(kind, most_rows, most_outputs, tile):
    x, weight, _ = make_problem(most_rows, min(most_outputs, 512), 1024, kind)
    clean = matmul_sm90(x, weight, None, tile, kind)
    x[1::2] = float("nan")
    assert torch.equal(matmul_sm90(x, weight, None, tile, kind)[..., ::2, :], clean[..., ::2, :])


@pytest.mark.gpu
@needs_sm90
@pytest.mark.parametrize("rows", [32, 64, 128, 192, 256])
def test_waits_for_the_kernels_before_it(rows):
    hidden, inner, dtype, device = 1024, 3072, torch.bfloat16, torch.device("cuda")
    layers = [(make_problem(1, inner, hidden, GATED)[1], make_problem(1, hidden, inner, PARTS)[1]) for _ in range(12)]
    norm = torch.ones(hidden, dtype=dtype, device=device)
    start = torch.randn(rows, hidden, device=device, dtype=dtype)
    residual, out = torch.empty_like(start), torch.empty_like(start)

    def chain(after_each):
        residual.copy_(start)
        x = rms_norm(residual, norm, 1e-6)
        for gate_up, down in layers:
            for weight, kind in ((gate_up, GATED), (down, PARTS)):
                x = matmul_sm90(x, weight, None, find_tile(x, weight, kind), kind)
                after_each()
            x = rms_norm(x, norm, 1e-6, residual)
            after_each()
        out.copy_(x)

    check_chain(chain, out)


def test_which_tile():
    def find(rows, outputs, inputs, kind, dtype=torch.bfloat16, skip=0):
        x, weight, _ = (t.to(dtype) for t in make_problem(rows, outputs, inputs + skip, kind, device="cpu"))
        return find_tile(x[:, skip:], weight[:, skip:], kind)

    buckets = list(TILES["sm_90"])
    for kind, rows, outputs in buckets:  # the first that holds counts: those for fewer rows, then fewer outputs, first
        assert rows in (*row_borders(), MAX_ROWS)
        of_kind = [bucket for bucket in buckets if bucket[0] == kind]
        assert of_kind == sorted(of_kind)
        assert find(rows, min(outputs, 20480), 8, kind) == TILES["sm_90"][kind, rows, outputs]
    for kind in (WHOLE, GATED, PARTS):
        assert find(64, 1024, 1024, kind, torch.float16) == find(64, 1024, 1024, kind) is not None
        assert find(MIN_ROWS - 1, 1024, 1024, kind) is None
        assert find(MAX_ROWS + 1, 1024, 1024, kind) is None
        assert find(64, 1024, 1024, kind, torch.float32) is None
        assert find(64, 1024, 1024, kind, skip=1) is None  # TMA needs 16 bytes
    assert find(64, 512, 1024, WHOLE) is None  # narrow: half of the GPU would wait
    assert find(64, 1020, 1024, GATED) is None  # pairs of 8 rows
    assert find(256, 12672 + 8, 8, GATED) is None  # not all programs at once: torch is faster


@pytest.mark.parametrize("outputs, inputs, parts", [(4096, 4096, 4), (5120, 17408, 3), (1024, 3072, 4), (1024, 500, 2)])
def test_parts_fill_the_gpu(outputs, inputs, parts):
    tile = TILES["sm_90"][PARTS, 64, ANY]
    assert grid(tile, PARTS, 64, outputs, inputs, processors=132) == (1, outputs // 128, parts)
    assert grid(tile, PARTS, 64, outputs, inputs, processors=1)[2] == 1
    assert grid(tile, WHOLE, 65, outputs, inputs, processors=132) == (2, outputs // 128, 1)


@pytest.mark.parametrize(
    "kind, outputs, inputs, runs",
    [
        (GATED, 12288, 4096, True),
        (PARTS, 4096, 12288, True),
        (PARTS, 1024, 3072, True),
        (GATED, 3072, 1024, True),
        (GATED, 17408, 5120, True),
        (GATED, 5120, 4096, False),  # 107 programs
        (GATED, 14336, 4096, False),  # 106
        (PARTS, 3072, 8192, False),  # 96
    ],
)
def test_many_rows_of_a_large_weight_fill_the_gpu_or_are_left_to_torch(monkeypatch, kind, outputs, inputs, runs):
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    weight = torch.empty(outputs * (1 + (kind == GATED)), inputs, dtype=torch.bfloat16)
    assert find_tile(weight[:64], weight, kind) is not None
    assert (find_tile(weight[:128], weight, kind) is not None) == runs


@pytest.mark.parametrize("outputs, processors, runs", [(17408, 132, True), (14336, 132, False), (17408, 114, False)])
def test_tiles_may_take_turns_that_are_full(monkeypatch, outputs, processors, runs):
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: processors)
    weight = torch.empty(2 * outputs, 5120, dtype=torch.bfloat16)
    assert (find_tile(weight[:192], weight, GATED) is not None) == runs


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", lambda a: a.update(x=a["x"][:31])),
        ("weight", lambda a: a.update(weight=a["weight"][:, :-8])),
        ("weight", lambda a: a.update(weight=a["weight"].half())),
        ("bias", lambda a: a.update(bias=a["bias"][1:])),
        ("bias", lambda a: a.update(bias=a["bias"].float())),
    ],
)
def test_refuses_bad_arguments(name, change):
    x, weight, bias = make_problem(64, 128, 64, WHOLE, device="cpu")
    arguments = {"x": x, "weight": weight, "bias": bias, "tile": TILES["sm_90"][WHOLE, 64, 8448], "kind": WHOLE}
    change(arguments)
    with pytest.raises(ValueError, match=f"^{name}:"):
        matmul_sm90(**arguments)
