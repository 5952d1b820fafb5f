"""Evaluations with a real engine: the demo model's score, going on after a stop, and grading again without a model."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisgl.demo import MODEL_PATH
from minisgl.errors import MinisglError
from minisgl.evaluate.evaluation import Evaluation
from minisgl.evaluate.task import Task, load_task
from tests.evaluate.conftest import evaluate, read_samples, values

pytestmark = pytest.mark.skipif(not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights")

SUMS = [
    {"q": f"What is {a} + {b}?", "answer": a + b, "kind": "big" if a > 9 else "small"}
    for a in (2, 3, 40)
    for b in (4, 5)
]
SUM = Task(name="sums", prompt_column="q", chat=True, extract="number", match="number", group="kind")


def test_the_demo_task_gives_the_score_of_the_demo_module(tmp_path: Path) -> None:
    from minisgl import LLM
    from minisgl.demo.score import score

    results = evaluate(load_task("demo"), "demo", tmp_path / "demo", limit=20)
    with LLM() as llm:
        expected = score(llm, 2)
    found = {one["task"].removeprefix("demo/"): one["value"] for one in results["metrics"][1:]}
    assert found == expected
    assert Counter(sample["group"] for sample in read_samples(tmp_path / "demo")) == dict.fromkeys(expected, 2)
    assert {"prompt_hash", "model_revision", "seed", "seconds", "tokens_per_s"} <= set(results)
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results


def test_groups_and_samples(write: Any, tmp_path: Path) -> None:
    results = evaluate(SUM, write(SUMS), tmp_path / "out")
    assert [(one["task"], one["n"]) for one in results["metrics"]] == [
        ("sums", 6),
        ("sums/small", 4),
        ("sums/big", 2),
    ]
    assert values(results) == {"accuracy": 1.0}
    sample = read_samples(tmp_path / "out")[0]
    assert (sample["output"], sample["answer"], sample["target"], sample["verdict"]) == ("6", "6", 6, "right")
    assert sample["prompt"] == [{"role": "user", "content": "What is 2 + 4?"}]


def test_another_way_to_grade_asks_no_model(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(SUMS)
    evaluate(SUM, data, tmp_path / "out")
    monkeypatch.setattr(Evaluation, "load", lambda self: pytest.fail("the model was loaded"))
    strict = evaluate(replace(SUM, extract="regex:^[0-5]$", match="exact"), data, tmp_path / "out")
    assert values(strict)["accuracy"] == 0.0 and strict["extraction_failure_rate"] == 1.0
    assert strict["seconds"] is None and strict["rows_of_earlier_runs"] == 6
    with pytest.raises(MinisglError, match="few_shot was 0, is 1"):
        evaluate(replace(SUM, few_shot=1), data, tmp_path / "out")


def test_a_lower_limit_counts_no_more_rows(write: Any, tmp_path: Path) -> None:
    data = write(SUMS)
    assert evaluate(SUM, data, tmp_path / "out", limit=4)["rows"] == 4
    assert evaluate(SUM, data, tmp_path / "out", limit=2)["rows"] == 2
    assert evaluate(SUM, data, tmp_path / "out")["rows"] == 6


@pytest.mark.parametrize("mode", ["generate", "choice"])
def test_a_stopped_evaluation_goes_on(write: Any, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.evaluate import scoring

    monkeypatch.setitem(scoring.CHUNK_ROWS, "choice", 2)
    task = Task(mode=mode, prompt_column="q", chat=True, options="[answer, answer + 1]" if mode == "choice" else None)
    data, folder = write(SUMS), tmp_path / "out"
    with Evaluation(task, [data], folder, engine={"max_running": 1}) as evaluation:
        assert evaluation.has_rows_left
        with evaluation.load() as llm:
            summary = evaluation.answer(llm, should_stop=lambda: evaluation.output.num_rows >= 2)
    assert summary.stopped
    done = len((folder / "answers.jsonl").read_text().splitlines())
    assert 2 <= done < len(SUMS)
    results = evaluate(task, data, folder, engine={"max_running": 1})
    whole = evaluate(task, data, tmp_path / "whole")
    assert results["rows_of_earlier_runs"] == done
    assert [one["value"] for one in results["metrics"]] == [one["value"] for one in whole["metrics"]]
    for sample, other in zip(read_samples(folder), read_samples(tmp_path / "whole"), strict=True):
        logprobs = sample.pop("logprobs", [])  # a batch of another shape may round otherwise
        assert logprobs == pytest.approx(other.pop("logprobs", []), abs=1e-4)
        assert sample == other


def test_two_ranks_score_as_one_does(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the other rank runs references
    task = Task(mode="choice", prompt_column="q", chat=True, options="[answer, answer + 1]")
    one, two = (
        evaluate(task, write(SUMS), tmp_path / f"{tp}", engine={"device": "cpu", "tp": tp, "num_pages": 16})
        for tp in (1, 2)
    )
    assert [metric["value"] for metric in one["metrics"]] == [metric["value"] for metric in two["metrics"]]
    for sample, other in zip(read_samples(tmp_path / "1"), read_samples(tmp_path / "2"), strict=True):
        assert sample.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-4)
        assert sample == other


@pytest.mark.gpu
def test_the_scores_of_each_skill_are_equal_on_cpu_and_gpu(tmp_path: Path) -> None:
    engine = {"dtype": "float32", "num_pages": 500}
    on_cpu, on_gpu = (
        evaluate(load_task("demo"), "demo", tmp_path / device, limit=300, engine={"device": device, **engine})
        for device in ("cpu", "cuda")
    )
    assert [one["n"] for one in on_cpu["metrics"]] == [300, *[30] * 10]  # all skills, and each
    assert on_gpu["metrics"] == on_cpu["metrics"]


def test_many_samples_of_a_row(write: Any, tmp_path: Path) -> None:
    task = Task(prompt_column="q", chat=True, extract="number", match="number", n=3)
    results = evaluate(task, write(SUMS[:2]), tmp_path / "out", sampling={"temperature": 1.5})
    assert {*values(results)} == {"pass@1", "pass@2", "pass@3", "majority"}
    assert all(len(sample["samples"]) == 3 for sample in read_samples(tmp_path / "out"))
    with pytest.raises(MinisglError, match="--n 3 at temperature 0 gives equal samples"):
        evaluate(task, write(SUMS[:2]), tmp_path / "greedy")


def test_nothing_is_left_of_an_evaluation_that_cannot_start(write: Any, tmp_path: Path) -> None:
    for data, options in (("missing.jsonl", {}), (write(SUMS), {"model": "no/such/folder"})):
        with pytest.raises(MinisglError):
            evaluate(SUM, data, tmp_path / "out", **options)
    with pytest.raises(MinisglError, match="the columns are: q, answer, kind"):
        evaluate(Task(prompt_column="x"), write(SUMS), tmp_path / "out")
    assert not (tmp_path / "out").exists()
