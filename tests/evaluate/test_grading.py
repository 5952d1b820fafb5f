"""Lines of answers become verdicts and scores."""

from itertools import combinations
from typing import Any

import pytest

from minisgl.evaluate.grading import Grader, grade_all, metric_names, pass_at, sample_counts
from minisgl.evaluate.task import Task


def line(*texts: str, target: Any = "5", error: Any = None, finish: str = "stop") -> dict[str, Any]:
    samples = [{"text": text, "finish_reason": finish} for text in texts]
    many = {"samples": samples} if len(texts) > 1 else {}
    return {"id": 0, "index": 0, "prompt": "q", "target": target, "error": error, **samples[0], **many}


def grade(task: Task, *texts: str, allow_code: bool = False, **values: Any) -> dict[str, Any]:
    [sample] = grade_all(task, [line(*texts, **values)], allow_code=allow_code)
    return sample


@pytest.mark.parametrize(
    ("text", "answer", "verdict", "score"),
    [("so 5", "5", "right", 1.0), ("so 6", "6", "wrong", 0.0), ("no idea", None, "no answer", 0.0)],
)
def test_one_answer(text: str, answer: str | None, verdict: str, score: float) -> None:
    sample = grade(Task(extract="number", match="number"), text)
    assert (sample["output"], sample["answer"], sample["target"]) == (text, answer, "5")
    assert (sample["verdict"], sample["scores"]) == (verdict, {"accuracy": score})


def test_a_row_without_an_answer_is_wrong() -> None:
    error = {"type": "prompt_too_long", "message": "it is"}
    sample = grade(Task(), "", error=error)
    assert (sample["verdict"], sample["scores"], sample["error"]) == ("error", {"accuracy": 0.0}, error)


def test_a_target_that_cannot_be_compared() -> None:
    sample = grade(Task(match="number"), "5", target="five")
    assert sample["verdict"] == "error" and sample["scores"] == {"accuracy": 0.0}
    assert sample["error"] == {"type": "invalid_target", "message": "the target 'five' is not a number"}


def test_several_answers() -> None:
    task = Task(n=4, extract="number", match="number")
    sample = grade(task, "so 7", "5", "none", "5.0")
    assert [one["verdict"] for one in sample["samples"]] == ["wrong", "right", "no answer", "right"]
    assert sample["scores"] == {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1.0, "majority": 1.0}
    assert (sample["answer"], sample["verdict"]) == ("5", "right")  # 5 and 5.0 are one vote
    assert grade(task, "7", "5", "x", "y")["scores"]["majority"] == 0.0  # of equal counts the first
    assert grade(task, "x", "y", "z", "w")["verdict"] == "no answer"


@pytest.mark.parametrize(("n", "num_right"), [(1, 0), (1, 1), (5, 2), (6, 6), (4, 0)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int, num_right: int) -> None:
    for k in range(1, n + 1):
        drawn = list(combinations([True] * num_right + [False] * (n - num_right), k))
        assert pass_at(k, n, num_right) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def test_the_k_of_pass_at_k() -> None:
    assert [sample_counts(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    assert metric_names(Task(n=2)) == ["pass@1", "pass@2", "majority"]
    assert metric_names(Task(n=2, match="python")) == ["pass@1", "pass@2"]


TARGET = ["def add(a, b):\n", "assert add(2, 3) == 5\n"]


def test_programs_run_only_when_that_is_allowed() -> None:
    task = Task(extract="code", match="python")
    refused = grade(task, "    return a + b", target=TARGET)
    assert (refused["verdict"], refused["scores"]) == ("not run", {})
    assert grade(task, "    return a + b", target=TARGET, allow_code=True)["scores"] == {"pass@1": 1.0}
    assert grade(task, "    return a - b", target=TARGET, allow_code=True)["scores"] == {"pass@1": 0.0}
    whole = "Sure:\n```python\n    pass\ndef add(a, b):\n    return a + b\n```"
    assert grade(task, whole, target=TARGET, allow_code=True)["verdict"] == "right"
    assert grade(task, "x", target="no pair", allow_code=True)["error"]["type"] == "invalid_target"
    several = grade(Task(n=2, extract="code", match="python"), "    return a + b", "    1", target=TARGET)
    assert several["scores"] == {}


def test_instructions() -> None:
    task = Task(match="instructions")
    target = [["punctuation:no_comma", "change_case:english_lowercase"], [{}, {}]]
    sample = grade(task, "Fine here", target=target)
    assert sample["answer"] == [True, False]
    assert sample["scores"] == {"prompt_accuracy": 0.0, "instruction_accuracy": [1.0, 2.0]}
    assert grade(task, "", target=target)["scores"]["instruction_accuracy"] == [0.0, 2.0]
    unknown = grade(task, "Ja", target=[["language:response_language"], [{"language": "de"}]])
    assert unknown["verdict"] == "error" and unknown["scores"] == {"prompt_accuracy": 0.0}


def test_a_choice() -> None:
    row = line("b") | {
        "options": ["a", "b", ["context", "long one"]],
        "option_logprobs": [-3.0, -1.0, -1.5],
        "target": [2],
    }
    sample = Grader(Task(mode="choice", options="o")).grade(row)
    assert (sample["answer"], sample["verdict"]) == ("b", "wrong")
    assert sample["scores"] == {"accuracy": 0.0, "accuracy_norm": 1.0}  # -1.5 over 8 characters
