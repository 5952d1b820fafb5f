"""The harness with a clock that is given: what is measured needs a GPU, what is made of it does not."""

import json
import re
import subprocess
from collections.abc import Callable
from importlib import import_module

import pytest
import torch

import minisgl
from minisgl.bench import harness, kernels
from minisgl.bench.harness import Case, Ceilings, environment, measure, table, write_rows
from minisgl.errors import MinisglError

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Every launch takes 10 us, 8 in a graph; the device copies 4000 GB/s and computes 500 TFLOP/s."""
    monkeypatch.setattr(harness, "time_us", lambda run: run() or 10.0)
    monkeypatch.setattr(harness, "graph_time_us", lambda run: 8.0)
    monkeypatch.setattr(harness, "ceilings", lambda device: Ceilings(4000.0, 500.0))


def case(bytes_moved: int = 20_000_000, flops: int = 0) -> Case:
    return Case("add", "64 x 4096", lambda: None, {"torch": lambda: 25.0}, bytes_moved, flops)


def test_a_row_names_speed_share_and_origin(clock):
    row = measure(case(), CPU)
    assert (row["op"], row["shape"], row["us"], row["graph_us"]) == ("add", "64 x 4096", 10.0, 8.0)
    assert (row["gb_s"], row["tflops"], row["share"]) == (2000.0, None, 0.5)
    assert (row["baselines_us"], row["baselines_graph_us"]) == ({"torch": 25.0}, {"torch": 8.0})
    assert row["ceilings"] == {"copy_gb_s": 4000.0, "matmul_tflops": 500.0}
    assert row["architecture"] == "cpu" and row["device"]
    assert row["versions"].keys() == {"minisgl", "torch", "triton", "python"}
    assert row["versions"]["minisgl"] == minisgl.__version__
    assert row["date"].endswith("+00:00")
    json.dumps(row)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_rest_working():
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        harness.graph_time_us(lambda: x.nonzero())  # the host waits for how many there are
    assert torch.randn(4, device="cuda").isfinite().all()
    assert harness.graph_time_us(lambda: x + 1) > 0


def test_share_is_of_the_ceiling_that_bounds(clock):
    row = measure(case(bytes_moved=1000, flops=4_000_000_000), CPU)
    assert (row["tflops"], row["share"]) == (400.0, 0.8)


def test_a_baseline_that_fails_is_left_out(clock, monkeypatch, capsys):
    def fails() -> None:
        raise RuntimeError("no kernel for this device\nand a long trace")

    def no_graph(run: Callable[[], float | None]) -> float:
        if run() == 25.0:
            raise RuntimeError("cannot be captured")
        return 8.0

    monkeypatch.setattr(harness, "graph_time_us", no_graph)
    baselines = {"torch": lambda: 25.0, "flex": fails}
    row = measure(Case("add", "1", lambda: None, baselines, 1000), CPU)
    assert (row["baselines_us"], row["baselines_graph_us"]) == ({"torch": 25.0}, {})
    assert capsys.readouterr().err.splitlines() == [
        "no baseline flex: RuntimeError: no kernel for this device",
        "no baseline torch, in a graph: RuntimeError: cannot be captured",
    ]
    assert "torch 25.0 (2.50x)" in table([row])


def test_commit_is_none_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert environment(CPU)["commit"] is None
    (tmp_path / ".git").write_text("not a repository")
    assert environment(CPU)["commit"] is None


def test_commit_says_that_files_have_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "a").write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = harness.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "b").write_text("a new file is no change")
    assert harness.commit() == clean
    (tmp_path / "a").write_text("2")
    assert harness.commit() == f"{clean}-dirty"


def test_write_rows_appends(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    write_rows(path, [{"op": "a"}, {"op": "b"}])
    write_rows(str(path), [{"op": "c"}])
    assert [json.loads(line)["op"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_table(clock):
    lines = table([measure(case(), CPU), measure(case(flops=10**9), CPU)]).splitlines()
    assert " ".join(lines[0].split()) == "op shape us graph us GB/s TFLOP/s of ceiling baselines: us, graph us"
    assert " ".join(lines[1].split()) == "add 64 x 4096 10.0 8.0 2000 - 50% torch 25.0 (2.50x), 8.0 (1.00x)"
    assert lines[2].split()[7] == "100.0"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_kernels_need_a_gpu(device):
    with pytest.raises(MinisglError, match="needs a GPU"):
        kernels.run([], device)


def test_kernels_names_the_known_ops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MinisglError, match="'nonsense': known are .*rms_norm"):
        kernels.run(["nonsense"], "cuda")


def test_kernels_of_other_gpus_are_left_out(monkeypatch):
    monkeypatch.setattr(kernels.launch, "architecture", lambda device: "sm_80")
    known = kernels.available_ops()
    of_hopper = {"heads_matmul_sm90", "matmul_sm90", "prefill_matmul_sm90"}
    assert set(known) - set(kernels.choose_ops([], known, CPU)) == of_hopper
    with pytest.raises(MinisglError, match="matmul_sm90 is for sm_90 alone, and cpu is sm_80"):
        kernels.choose_ops(["rotary", "matmul_sm90"], known, CPU)
    monkeypatch.setattr(kernels.launch, "architecture", lambda device: "sm_90")
    assert kernels.choose_ops([], known, CPU) == known
    assert kernels.choose_ops(["matmul_sm90"], known, CPU) == ["matmul_sm90"]


OPS = ["common_prefix", "embedding", "prefill_matmul_sm90", "rms_norm", "rotary", "sampling", "silu_mul"]


@pytest.mark.parametrize("op", OPS)
def test_cases_can_be_built(op):
    """On the meta device: real shapes, no memory."""
    assert op in kernels.available_ops()
    cases = list(import_module(f"minisgl.bench.{op}").cases(torch.device("meta")))
    assert cases and len({case.shape for case in cases}) == len(cases)
    for case in cases:
        assert case.op == op and case.bytes_moved > 0 and case.baselines
