"""`minisgl eval --url` on a really running server gives what an evaluation of the same model here gives."""

from pathlib import Path
from typing import Any

import pytest

from minisgl.evaluate.task import Task, load_task
from tests.evaluate.conftest import evaluate, read_samples, write
from tests.server.conftest import RunningServer

__all__ = ["write"]  # a fixture

ROWS = [
    {"q": "What is 2 + 3?", "options": ["5", "6", "seven"], "answer": 0},
    {"q": "Name the capital of Chad. “é”  ", "options": ["N'Djamena", "Rome"], "answer": 0},
]


def test_the_demo_questions(server: RunningServer, tmp_path: Path) -> None:
    here = evaluate(load_task("demo"), "demo", tmp_path / "here", limit=20)
    there = evaluate(load_task("demo"), "demo", tmp_path / "there", limit=20, url=server.url)
    assert there["model"] == "demo" and there["prompt_hash"] == here["prompt_hash"]
    assert there["metrics"] == here["metrics"]
    assert read_samples(tmp_path / "there") == read_samples(tmp_path / "here")


def test_options(server: RunningServer, write: Any, tmp_path: Path) -> None:
    task = Task(mode="choice", prompt_column="q", options="options", chat=True)
    data = write(ROWS)
    evaluate(task, data, tmp_path / "here")
    evaluate(task, data, tmp_path / "there", url=server.url)
    pairs = list(zip(read_samples(tmp_path / "here"), read_samples(tmp_path / "there"), strict=True))
    for here, there in pairs:
        assert there["logprobs"] == pytest.approx(here["logprobs"], abs=1e-4)
        assert there["answer"] == here["answer"]
