"""The command line on the stand-in engine of tests/batch_run: `minisgl.llm` is replaced for the test."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minisgl.batch_run import job
from minisgl.cli.main import main
from tests.batch_run.fake_llm import fake_llm

__all__ = ["fake_llm"]

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(fake_llm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Invoke]:
    """`invoke("run", "in.jsonl", input=b"...")` in an empty folder, with FakeLLM as the engine."""
    monkeypatch.setitem(sys.modules, "minisgl.llm", SimpleNamespace(LLM=fake_llm))
    monkeypatch.setattr(job, "revision", lambda model: "as it was")
    monkeypatch.setattr(job, "resolved_dtype", lambda model, engine: engine.get("dtype", "float32"))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    yield lambda *args, input=None: CliRunner().invoke(main, [str(arg) for arg in args], input=input)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Ten good rows."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {index}", "prompt": f"p{index}"}) + "\n" for index in range(10)))
    return path


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a results file, in the order of the input."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])
