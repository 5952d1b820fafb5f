"""A small random model, and what tests say of evaluations."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from minisgl.evaluate.evaluation import Evaluation
from minisgl.evaluate.task import Task
from tests.tiny_models import make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of 264 tokens and a context of 256."""
    return make("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Iterable[dict[str, Any]]], str]:
    """`write(rows)` makes a file of JSON lines."""

    def write_rows(rows: Iterable[dict[str, Any]]) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def evaluate(task: Task, data: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Run an evaluation to its end; returns its results."""
    from minisgl.batch_run.row_run import Summary

    allow_code = options.pop("allow_code", False)
    with Evaluation(task, [data], folder, **options) as evaluation:
        summary = Summary()
        if evaluation.has_rows_left:
            with evaluation.load() as llm:
                summary = evaluation.answer(llm)
        evaluation.finish()
        return evaluation.grade(summary, allow_code=allow_code)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def values(results: dict[str, Any]) -> dict[str, float]:
    """The metrics of all rows."""
    return {one["metric"]: one["value"] for one in results["metrics"] if one["task"] == results["task"]}
