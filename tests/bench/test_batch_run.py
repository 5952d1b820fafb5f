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
def test_the_cost_of_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batch_run, "NUM_ROWS", 80)
    monkeypatch.setitem(WORKLOADS, "mini", lambda seed: Workload([[1, 2, 3]] * 4, [2] * 4))
    path = tmp_path / "rows.jsonl"
    rows = list(batch_run.run(str(MODEL_PATH), "mini", repeats=2, warmups=0, json_path=path, device="cpu", max_len=64))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    journal, overhead = rows
    assert journal["rows_per_s"] > 0
    assert "1,024 bytes" in batch_run.table(journal)
    assert overhead["overhead"] > -1 and len(overhead["job_s"]) == len(overhead["generate_s"]) == 2
    assert "2 timed" in batch_run.table(overhead)


def test_the_figure_of_the_readme_is_the_last_measured_one() -> None:
    rows = [json.loads(line) for line in (ROOT / "bench" / "results" / "batch_run.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["bench"] == "batch_run" and row["workload"] == "mini"][-1]
    assert f"takes {last['overhead']:.1%} longer than `LLM.generate`" in (ROOT / "README.md").read_text()
