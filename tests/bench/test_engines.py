"""Throughput and latency from end to end on a CPU with the demo model, and what their rows say."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.bench import latency, throughput
from minisgl.bench.engines import SHAPES, MinisglEngine, Outcome, find_model
from minisgl.bench.transformers_engine import TransformersEngine
from minisgl.bench.workloads import Workload
from minisgl.demo import MODEL_PATH
from minisgl.errors import MinisglError

MODEL = str(MODEL_PATH)
SMALL = {"device": "cpu", "max_running": 8, "num_pages": 64}
WORK = Workload([[5, 6, 7], list(range(9, 90))], [4, 7])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = ({"prompt_token_ids": ids, "max_tokens": length} for ids, length in zip(*WORK, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """Runs that take 1, 2, 4, 8, ... seconds, the first of them a warm-up; returns what was run."""
    ran: list[Workload] = []

    def run(engine: MinisglEngine, workload: Workload, with_times: bool = False) -> Outcome:
        ran.append(workload)
        seconds = 2.0 ** (len(ran) - 1)
        times = [[seconds * (place + 1) for place in range(length)] for length in workload.output_lens]
        return Outcome(seconds, sum(workload.output_lens), 0, times if with_times else [])

    monkeypatch.setattr(MinisglEngine, "run", run)
    return ran


def test_tokens_per_second_are_of_the_median_run(clock: list[Workload], prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (row,) = throughput.run(MODEL, str(prompts), json_path=path, **SMALL)
    assert clock == [WORK] * 4
    assert row["seconds"] == 4.0 and row["seconds_all"] == [2.0, 4.0, 8.0]
    assert (row["output_tokens"], row["output_tokens_per_s"]) == (11, 2.8)
    assert (row["prompt_tokens"], row["input_tokens_per_s"]) == (84, 21.0)
    assert row["workload"] == "prompts.jsonl" and row["options"] == {"max_running": 8, "num_pages": 64}
    assert json.loads(path.read_text()) == row
    assert "2.8  (1.4 .. 5.5)" in throughput.table(row)


def test_latency_figures(clock: list[Workload]) -> None:
    (row,) = latency.run(MODEL, batch=2, input_len=3, output_len=4, repeats=2, **SMALL)
    # Repeats of 2 and 4 seconds a token.
    assert row["ttft_ms"] == {"p50": 3000.0, "p90": 4000.0, "p99": 4000.0, "p50_all": [2000.0, 4000.0]}
    assert row["itl_ms"]["p50_all"] == [2000.0, 4000.0]
    assert row["e2e_ms"] == {"p50": 12000.0, "p90": 16000.0, "p99": 16000.0, "p50_all": [8000.0, 16000.0]}
    assert "p50 of the repeats 2000.00 .. 4000.00" in latency.table(row)


def test_one_token_has_no_gap(clock: list[Workload]) -> None:
    (row,) = latency.run(MODEL, output_len=1, repeats=1, **SMALL)
    assert row["itl_ms"] is None and row["ttft_ms"] == row["e2e_ms"]
    assert "ITL" not in latency.table(row)


def test_the_engine_makes_every_token_and_starts_cold() -> None:
    with MinisglEngine(MODEL_PATH, SMALL) as engine:
        outcomes = [engine.run(WORK, with_times=True) for _ in range(2)]
        assert engine.run(WORK).token_times == []
    for outcome in outcomes:
        assert (outcome.output_tokens, outcome.cached_tokens) == (11, 0)
        assert [len(times) for times in outcome.token_times] == WORK.output_lens
        for times in outcome.token_times:
            assert times[0] > 0 and times == sorted(times) and times[-1] <= outcome.seconds


@pytest.mark.parametrize("work", [Workload([[5] * 3000], [1]), Workload([[5] * 2000], [100])])
def test_a_workload_that_does_not_fit(work: Workload) -> None:
    with MinisglEngine(MODEL_PATH, SMALL) as engine, pytest.raises(MinisglError, match="does not fit the model: .*2,0"):
        engine.run(work)


def test_shapes_get_random_weights() -> None:
    assert find_model("qwen3-8b", {"max_len": 9}) == (SHAPES / "qwen3-8b", {"max_len": 9, "load_format": "dummy"})
    assert find_model(MODEL, {}) == (MODEL_PATH, {})


def test_the_same_work_through_transformers(prompts: Path) -> None:
    pytest.importorskip("psutil")  # continuous batching on a CPU asks for it
    options: dict[str, Any] = {"repeats": 1, "warmups": 0, "baseline": "transformers", **SMALL}
    ours, theirs = throughput.run(MODEL, str(prompts), **options)
    assert (ours["engine"], theirs["engine"]) == ("minisgl", "transformers")
    for what in ("model", "workload", "prompt_tokens", "output_tokens", "dtype", "device"):
        assert ours[what] == theirs[what]
    assert theirs["attention"] == "sdpa" and theirs["engine_version"]
    assert throughput.ratio(ours, theirs) == theirs["seconds"] / ours["seconds"]
    for row in (ours, theirs):  # of one run, the median is also the least and the most
        rate = f"{row['output_tokens_per_s']:,.1f}"
        assert f"{rate}  ({rate} .. {rate})" in throughput.table(row)

    ours, theirs = latency.run(MODEL, batch=2, input_len=9, output_len=3, **options)
    for figures in (theirs[metric] for metric in latency.METRICS):
        assert 0 < figures["p50"] <= figures["p99"]
    assert theirs["ttft_ms"]["p50"] < theirs["e2e_ms"]["p50"]


def test_a_gpu_beside_does_not_size_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers plans its steps with the memory of a GPU if there is one, and then allocates them on the CPU."""
    pytest.importorskip("psutil")
    import transformers.generation.continuous_batching.cache as cache

    of_a_gpu = (torch.device("cuda"), 139 << 30, 0, 0)  # total, reserved, allocated
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: of_a_gpu)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with TransformersEngine(MODEL_PATH, {"device": "cpu"}) as engine:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
        try:
            assert engine.run(WORK).output_tokens == 11
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def test_without_continuous_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.generation.continuous_batching.utils", None)
    with pytest.raises(MinisglError, match="needs continuous batching: pip install"):
        TransformersEngine(MODEL_PATH, {})


def test_a_trace_of_the_middle_of_a_run(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    list(throughput.run(MODEL, str(prompts), repeats=1, warmups=0, profile_dir=folder, **SMALL))
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    table = (folder / "kernels.txt").read_text()
    assert "steps of" in table and "aten::mm" in table
    assert torch.is_grad_enabled()


def test_a_row_is_kept_when_the_baseline_fails(
    prompts: Path, tmp_path: Path, clock: list[Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.generation.continuous_batching.utils", None)
    path = tmp_path / "rows.jsonl"
    rows = throughput.run(MODEL, str(prompts), json_path=path, baseline="transformers", **SMALL)
    row = next(rows)
    with pytest.raises(MinisglError, match="needs continuous batching"):
        next(rows)
    assert json.loads(path.read_text()) == row


def test_nothing_is_measured_for_a_path_that_cannot_be_written(
    prompts: Path, tmp_path: Path, clock: list[Workload]
) -> None:
    for run in (throughput.run(MODEL, str(prompts), json_path=tmp_path), latency.run(MODEL, json_path=tmp_path)):
        with pytest.raises(IsADirectoryError):
            next(run)
    assert clock == []
