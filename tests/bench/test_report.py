"""The committed page is the one that the committed rows give; what is shown beside what, and the floor."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minisgl.bench import report, results
from minisgl.bench.engines import SHAPES
from minisgl.bench.floors import floor_s
from minisgl.bench.report import PAGE, PLOTS, Page
from minisgl.bench.results import FIGURES, Results, read_results
from minisgl.bench.workloads import WORKLOADS, Workload
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig

CARD = {"device": "a card", "dtype": "bfloat16", "commit": "abc1234", "versions": {"torch": "2.11"}}
CEILINGS = {"bench": "ceilings", "copy_gb_s": 4000.0, "matmul_tflops": 500.0, **CARD, "date": "2026-01-01"}
ONE_AND_TWO_SHOTS = (("one shot", 2.0), ("two shots", 3.5))


def throughput(engine: str, figure: float, date: str = "2026-01-02", **fields: Any) -> dict[str, Any]:
    row = {"bench": "throughput", "engine": engine, "engine_version": "1.0", "model": "qwen3-0.6b", "workload": "mini"}
    figures = {"output_tokens_per_s": figure, "seconds": 2.0, "seconds_all": [2.0, 4.0, 1.0], "ready_s": 3.0}
    return {**row, **figures, **CARD, "date": date, **fields}


PEERS = [throughput("vLLM", 20_000.0), throughput("mini-sglang", 25_000.0)]


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    assert Page(Results(read_results())).text() == PAGE.read_text(), "run `minisgl bench report`"


def test_the_page_shows_pictures_that_are_there() -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", PAGE.read_text())
    assert shown
    for path in shown:
        picture = (PAGE.parent / path).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000
    assert {path.name for path in PLOTS.iterdir()} == {Path(path).name for path in shown}


def test_peers_say_what_they_are() -> None:
    for line in (results.FOLDER / "peers.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["how"] and row["device"] == "NVIDIA H200" and row["date"]
        assert row["bench"] == "ceilings" or row["engine"] not in results.MEASURED


def test_the_latest_row_stands_beside_the_peers() -> None:
    rows = [
        CEILINGS,
        *PEERS,
        throughput("minisgl", 1.0, "2026-01-03"),
        throughput("minisgl", 30_000.0, "2026-01-04"),
        throughput("minisgl", 2.0, "2026-01-05", options={"overlap": False}),
        throughput("minisgl", 3.0, "2026-01-05", device="another card"),
        throughput("minisgl", 4.0, "2026-01-05", workload="my.jsonl"),
        throughput("transformers", 3_000.0, attention="sdpa"),
    ]
    (one,) = Results(rows).comparisons()
    assert one.figure("minisgl") == 30_000.0
    assert one.speed("minisgl", "mini-sglang") == pytest.approx(1.2)
    assert one.speed("nobody", "vLLM") is None
    text = Page(Results(rows)).text()
    # 2.0, 4.0 and 1.0 seconds: half and twice the median's speed.
    assert "| 30,000 | 15,000 .. 60,000 | 20,000 | 25,000 |" in text and "| 1.20x |" in text
    assert "| 30,000 | 3,000 | 10.0x | 1.0, sdpa |" in text


def test_seconds_are_better_when_smaller() -> None:
    fields = {"workload": "shared_prefix", "options": {"load_format": "dummy"}}
    peers = [throughput(name, 1.0, seconds=4.0, **fields) for name in ("vLLM", "mini-sglang")]
    rows = [CEILINGS, *peers, throughput("minisgl", 1.0, **fields)]
    (one,) = Results(rows).comparisons()
    assert one.speed("minisgl", "vLLM") == 2.0
    assert "| 2.00 | 1.00 .. 4.00 | 4.00 | 4.00 |" in Page(Results(rows)).text()


def test_starts() -> None:
    start = {"bench": "start", "engine": "minisgl", "model": "m", **CARD, "date": "2026-01-02"}
    rows = [{**start, "caches": "cold", "ready_s": 9.5}, {**start, "caches": "warm", "ready_s": 2.25}]
    rows += [{**start, "caches": "cold", "ready_s": 8.5, "date": "2026-01-03"}]
    rows += [{**start, "engine": "vLLM", "caches": "cold", "ready_s": 87}]
    text = Page(Results([CEILINGS, *PEERS, *rows])).text()
    each = "minisgl 8.5 s with cold caches, minisgl 2.25 s with warm caches, vLLM 87 s with cold caches"
    assert f"\nFrom nothing to ready with m: {each}." in text


def test_serving() -> None:
    figures = {"mean": 2.5, "p50": 2.0, "p99": 9.0}
    row = {"bench": "serve", "engine": "minisgl", "model": "m", "workload": "512x128", "request_rate": 8.0, **CARD}
    row |= {"max_concurrency": None, "ttft_ms": figures, "itl_ms": None, "e2e_ms": figures, "date": "2026-01-02"}
    row |= {"output_tokens_per_s": 900.0}
    flood = {**row, "request_rate": None, "max_concurrency": 64, "share_of_offline": 0.98}
    text = Page(Results([CEILINGS, *PEERS, row, flood])).text()
    same = "2.50 / 2.00 / 9.00 |  | 2.50 / 2.00 / 9.00 | 900"
    assert f"| m | 512x128 | 8 |  | {same} |  | abc1234 |" in text
    assert f"| m | 512x128 | all at once | 64 | {same} | 98.0% | abc1234 |" in text


def test_several_gpus() -> None:
    tp2 = {"model": "qwen3-8b", "num_devices": 2, "options": {"load_format": "dummy", "tp": 2}}
    rows = [throughput("vLLM", 200.0, **tp2), throughput("minisgl", 300.0, **tp2)]
    rows += [throughput("minisgl", 500.0, **{**tp2, "num_devices": 4, "options": {"tp": 2, "dp": 2}})]
    sums = [{"bench": "all_reduce", "op": op, "shape": "8 KB, 2 ranks", "graph_us": us} for op, us in ONE_AND_TWO_SHOTS]
    sums = [row | {"nccl_graph_us": 11.0, **CARD, "date": "2026-01-02"} for row in sums]
    text = Page(Results([CEILINGS, *PEERS, *rows, *sums])).text()
    assert "| qwen3-8b | mini | --tp 2 | 300 | 200 | 1.50x | abc1234 |" in text
    assert "| qwen3-8b | mini | --tp 2 --dp 2 | 500 |  |  | abc1234 |" in text
    assert "| 8 KB, 2 ranks | 2.0 | 3.5 | 11.0 | abc1234 |" in text


def test_latency_and_kernels() -> None:
    figures = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    latency = {"bench": "latency", "model": "m", "batch": 2, "input_len": 8, "output_len": 1, "ttft_ms": figures}
    latency |= {"itl_ms": None, "e2e_ms": figures, **CARD, "date": "2026-01-02"}
    kernel = {
        "bench": "kernels",
        "op": "attention_decode",
        "shape": "1 x 8",
        "us": 10.0,
        "graph_us": 5.0,
        "gb_s": 100.0,
    }
    kernel |= {"tflops": 1.0, "share": 0.03, "baselines_us": {"torch": 20.0}, "baselines_graph_us": {"torch": 4.0}}
    kernel |= {"ceilings": {"copy_gb_s": 4100.0, "matmul_tflops": 400.0}, **CARD, "date": "2026-01-02"}
    peer = {
        "bench": "kernels",
        "op": "attention_decode",
        "shape": "1 x 8",
        "engine": "FA3",
        **CARD,
        "date": "2026-01-01",
    }
    other = {**peer, "engine": "Triton", "us": 30}
    found = Results([CEILINGS, *PEERS, latency, kernel, {**peer, "gb_s": 120}, other])
    assert (found.copy_gb_s, found.matmul_tflops) == (4100.0, 500.0)
    text = Page(found).text()
    assert "| m | 2 x 8 in, 1 out | minisgl | 1.00 / 2.00 / 3.00 |  | 1.00 / 2.00 / 3.00 |" in text
    assert "| 1 x 8 | 10.0 / 5.00 | 100 / 200 | 3% | 50.0 / 250 | 120 | 30.0 us | abc1234 | 2026-01-02 |" in text


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    with pytest.raises(MinisglError, match="needs a checkout"):
        report.write_report()


def test_writing_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    assert all(path.stat().st_size for path in report.write_report())
    assert (tmp_path / "README.md").read_text() == PAGE.read_text()


def config(model: str = "qwen3-0.6b") -> ModelConfig:
    return ModelConfig.from_folder(SHAPES / model)


def test_the_floor_of_one_request_is_its_weights() -> None:
    # 0.6B: 28 layers of 15.7 M and a head of 156 M weights; 127 steps and the prefill read them all.
    weights = 28 * 1024 * (48 * 128 + 3 * 3072) + 151_936 * 1024
    keys = 28 * 2 * 8 * 128 * 2 * sum(range(2, 129))
    seconds = floor_s(config(), Workload([[1]], [128]), 1000.0, 1e9)
    assert seconds == pytest.approx((128 * 2 * weights + keys) / 1e12)


def test_the_floor_of_many_rows_is_their_flops() -> None:
    weights = 28 * 1024 * (48 * 128 + 3 * 3072) + 151_936 * 1024
    prompts = [[place] for place in range(50)]
    two, one = (floor_s(config(), Workload(prompts, [length] * 50), 1e9, 1.0) for length in (2, 1))
    assert two - one == pytest.approx(2 * weights * 50 / 1e12, rel=1e-6)


def test_a_shared_prefix_is_computed_and_read_once() -> None:
    alone = [[place] + [1] * 99 for place in range(8)]
    shared = [[1] * 99 + [place] for place in range(8)]
    slow_matmul, slow_copy = (1e9, 1.0), (1.0, 1e9)
    for rates, least in ((slow_matmul, 5), (slow_copy, 1.0)):
        one, other = (floor_s(config(), Workload(prompts, [4] * 8), *rates) for prompts in (alone, shared))
        assert one > least * other


def test_the_floor_of_mini() -> None:
    """What the goals were set by: 3.7 s, about 36,000 tokens/s, at 4.25 TB/s."""
    work = WORKLOADS["mini"](0)
    assert floor_s(config(), work, 4250, 790) == pytest.approx(3.7, abs=0.05)
    for model in ("qwen3-0.6b", "qwen3-8b", "qwen3-14b"):
        assert floor_s(config(model), work, 4250, 790) > floor_s(config(model), work, 8500, 1580) > 0
    assert set(FIGURES) == set(WORKLOADS)


def test_evaluations_with_and_without_the_cache_and_by_others() -> None:
    row = {"bench": "eval", "model": "qwen3-0.6b", "rows": 256, "context_words": 1024, "rows_per_s": 128.0}
    row |= {"seconds_all": [2.0, 4.0, 1.0], **CARD, "date": "2026-01-03"}
    measured = [
        {**row, "engine": "minisgl", "options": {"load_format": "dummy"}},
        {**row, "engine": "minisgl --cache none", "rows_per_s": 20.0, "options": {"cache": "none"}},
        {**row, "engine": "lm-eval hf", "engine_version": "0.4", "rows_per_s": 10.0},
        {**row, "engine": "minisgl", "device": "another card", "rows_per_s": 1.0},
    ]
    text = Page(Results([CEILINGS, *PEERS, *measured])).text().split("## Evaluation")[1]
    lines = [line.split(" | ")[2:5] for line in text.splitlines() if line.startswith("| qwen3-0.6b")]
    assert [line[:2] for line in lines] == [
        ["minisgl", "128"],
        ["minisgl --cache none", "20.0"],
        ["lm-eval hf", "10.0"],
    ]
    assert lines[0][2] == "64.0 .. 256"
