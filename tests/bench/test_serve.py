"""The figures of `bench serve`, from times that were made up; a running server is in tests/server/test_bench.py."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the extra bench")

from minisgl.bench import serve
from minisgl.bench.http_client import Timing
from minisgl.errors import MinisglError

SLOW = Timing(due_s=0.0, sent_s=0.001, tokens_s=[0.101, 0.111, 0.141], end_s=0.151, prompt_tokens=7, cached_tokens=4)
FAST = Timing(due_s=0.5, sent_s=0.5, tokens_s=[0.52], end_s=0.53, prompt_tokens=3)
REFUSED = Timing(due_s=0.6, sent_s=0.6, end_s=9.0, error="status 429: busy")


def test_arrivals_are_a_poisson_process() -> None:
    moments = np.array(serve.arrivals(4000, 8.0))
    gaps = np.diff(moments)
    assert moments[0] == 0 and gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05) and gaps.std() == pytest.approx(1 / 8, rel=0.05)
    assert serve.arrivals(9, 8.0, seed=3) == serve.arrivals(9, 8.0, seed=3) != serve.arrivals(9, 8.0, seed=4)
    assert serve.arrivals(3, 1.0)[2] == pytest.approx(2 * serve.arrivals(3, 2.0)[2])
    assert serve.arrivals(3, float("inf")) == [0, 0, 0]


def test_the_metrics_of_a_request() -> None:
    found = serve.metrics(SLOW)
    assert {name: pytest.approx(values) for name, values in found.items()} == {
        "ttft": [100],
        "itl": [10, 30],
        "tpot": [20],
        "e2e": [150],
    }
    assert serve.metrics(FAST)["tpot"] == serve.metrics(FAST)["itl"] == []


def test_a_summary_leaves_out_what_failed() -> None:
    row = serve.summary([SLOW, FAST, REFUSED], {"ttft": 50, "itl": 25})
    assert (row["requests"], row["failed"], row["first_error"]) == (3, 1, "status 429: busy")
    assert row["seconds"] == 0.53 and row["requests_per_s"] == pytest.approx(2 / 0.53, abs=1e-3)
    assert row["output_tokens_per_s"] == pytest.approx(4 / 0.53, abs=0.1)
    assert (row["prompt_tokens"], row["output_tokens"], row["cached_tokens"]) == (10, 4, 4)
    assert row["ttft_ms"] == {"mean": 60.0, "p50": 60.0, "p99": pytest.approx(99.2)}
    assert row["late_ms"]["mean"] == 0.5
    assert row["goodput"] == {"limits_ms": {"ttft": 50, "itl": 25}, "share": 0.3333}  # of all, failed ones too
    assert serve.summary([FAST], {})["itl_ms"] is None and serve.summary([FAST], {})["goodput"] is None
    with pytest.raises(MinisglError, match="no request was answered; the first error: status 429: busy"):
        serve.summary([REFUSED], {})


def test_offline_is_the_latest_row_of_the_same_work(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"bench": "throughput", "engine": "minisgl", "model": "shapes/m", "workload": "mini", "dtype": "float32"}
    rows: list[dict[str, Any]] = [
        {**row, "date": "2", "output_tokens_per_s": 20.0},
        {**row, "date": "1", "output_tokens_per_s": 10.0},
        {**row, "date": "3", "workload": "single"},
        {**row, "date": "3", "model": "other"},
        {**row, "date": "3", "bench": "latency"},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    server: Any = SimpleNamespace(model="served", info={"model_path": "/shapes/m"})
    about = {"engine": "minisgl", "model": "served", "workload": "mini", "dtype": "float32"}
    assert serve._offline(path, server, about)["output_tokens_per_s"] == 20
    with pytest.raises(MinisglError, match="has no row of served and prefill: run `minisgl bench throughput"):
        serve._offline(path, server, {**about, "workload": "prefill"})
