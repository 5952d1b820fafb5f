import json
from pathlib import Path

import pytest

from minisgl.bench import batch_run
from minisgl.bench.workloads import WORKLOADS, Workload
from minisgl.demo import MODEL_PATH

ROOT = Path(__file__).parents[2]

needs_demo_model = pytest.mark.skipif(
    not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights"
)


@needs_demo_model
def test_the_cost_of_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "REPEATS", 1)
    monkeypatch.setitem(WORKLOADS, "mini", lambda seed: Workload([[1, 2, 3]] * 4, [2] * 4))
    row = batch_run.overhead(str(MODEL_PATH), device="cpu", max_len=64)
    assert row["overhead"] > -1 and len(row["job_s"]) == len(row["generate_s"]) == 1


def test_the_rate_of_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "NUM_ROWS", 80)
    assert batch_run.journal()["rows_per_s"] > 0


def test_the_figure_of_the_readme_is_the_last_measured_one() -> None:
    rows = [json.loads(line) for line in batch_run.RESULTS.read_text().splitlines()]
    last = [row for row in rows if row["bench"] == "batch_run" and row["workload"] == "mini"][-1]
    assert f"takes {last['overhead']:.1%} longer than `LLM.generate`" in (ROOT / "README.md").read_text()
