"""Tasks: the presets on rows as their data sets have them, and what is said of YAML that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from minisgl.batch_run.parser import RowParser, Template
from minisgl.batch_run.rows import Record, Row
from minisgl.errors import MinisglError
from minisgl.evaluate.questions import Questions
from minisgl.evaluate.task import load_task, parse_task, presets, task_for
from minisgl.request import SamplingParams

# A row of each data set, in its own columns, and what a preset must make of it.
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "mmlu": {"question": " Which? ", "subject": "high_school_physics", "choices": ["a", "b", "c", "d"], "answer": 2},
    "arc": {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man [title] cooks.",
        "ctx_b": "he",
        "endings": [" eats.", "runs [title] Then"],
        "label": "1",
    },
    "winogrande": {"sentence": "Ann saw Eve since _ was there.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "truthfulqa-mc": {"question": "Is it?", "mc1_targets": {"choices": ["No", "Yes"], "labels": [0, 1]}},
    "ifeval-like": {
        "prompt": "No commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    },
    "humaneval": {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"},
    "wikitext": {"page": "= Title =\n\nText."},
}
ASKED: dict[str, dict[str, Any]] = {
    "gsm8k": {"prompt": "Question: How many?\nAnswer:", "target": "5"},
    "mmlu": {
        "prompt": "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        "options": ["A", "B", "C", "D"],
        "target": [2],
        "group": "high_school_physics",
    },
    "arc": {"prompt": "Question: Which?\nAnswer:", "options": ["x", "y"], "target": [1]},
    "hellaswag": {
        "prompt": "Cooking: A man. cooks. He",
        "options": ["eats.", "runs. Then"],
        "target": [1],
    },
    "winogrande": {
        "prompt": "",
        "options": [["Ann saw Eve since Ann", "was there."], ["Ann saw Eve since Eve", "was there."]],
        "target": [1],
    },
    "truthfulqa-mc": {"prompt": "Q: Is it?\nA:", "options": ["No", "Yes"], "target": [1]},
    "ifeval-like": {"target": [["punctuation:no_comma"], [{"num_words": None}]]},
    "humaneval": {
        "prompt": "def f():\n",
        "target": ["def f():\n", "def check(f):\n    assert f() == 1\n\ncheck(f)"],
    },
    "wikitext": {"prompt": "= Title =\n\nText."},
}


def test_every_preset_is_tried_here() -> None:
    assert {*presets()} == {*ROWS, "demo"}


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_on_a_row_of_its_data_set(name: str) -> None:
    task = load_task(name)
    parser = RowParser(
        SamplingParams(),
        chat=task.chat,
        prompt_column=task.prompt_column,
        template=Template(task.template) if task.template is not None else None,
    )
    row = Questions(task, seed=0).read(Record(0, "row 1", ROWS[name]), parser, learning=task.few_shot > 0)
    assert isinstance(row, Row), row
    assert {key: row.head.columns[key] for key in ASKED[name]} == ASKED[name]
    assert task.description and task_for(str(task.data)) == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping"),
        ("mode: [", "is not YAML"),
        ("mod: generate", "unknown setting 'mod'; did you mean 'mode'"),
        ("zzzz: 1", "the settings are: name, "),
        ("mode: guess", "mode is 'guess'; it must be one of generate, choice, ppl"),
        ("tolerance: high", "tolerance is 'high'; it must be a number"),
        ("mode: choice", "needs options"),
        ("sampling: {temprature: 1}", "temprature"),
        ("sampling: 3", "sampling must be a mapping"),
        ("{mode: ppl, few_shot: 2}", "leave --chat, --system and --few-shot out"),
        ("{mode: ppl, window: 8, stride: 9}", "--stride 9 would leave tokens out"),
        ("{mode: choice, options: [a], n: 2}", "--n is for mode generate"),
    ],
)
def test_what_is_wrong_with_a_yaml_file(text: str, message: str) -> None:
    with pytest.raises(MinisglError, match="^mine.yaml.*" + message.replace("[", "\\[")):
        parse_task(text, "mine.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match="does not exist"):
        load_task(str(tmp_path / "mine.yaml"))
    with pytest.raises(MinisglError, match="there is no task 'gsm9k'.*gsm8k"):
        load_task("gsm9k")
