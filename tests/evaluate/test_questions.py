"""Questions: columns that are missing, rows that cannot be asked, and examples before a question."""

from collections.abc import Sequence
from typing import Any

import pytest

from minisgl.batch_run.parser import RowParser, Template
from minisgl.batch_run.rows import BadRow, Record, Row
from minisgl.errors import MinisglError
from minisgl.evaluate.questions import Questions
from minisgl.evaluate.task import Task
from minisgl.request import SamplingParams

COLUMNS = {"q": "2 + 3", "right answer": 5, "level": "easy"}


def read_all(
    task: Task, rows: Sequence[dict[str, Any] | bytes], seed: int = 0, same_rows: bool = True
) -> list[Row | BadRow]:
    template = Template(task.template) if task.template is not None else None
    parser = RowParser(
        SamplingParams(), chat=task.chat, system=task.system, template=template, prompt_column=task.prompt_column
    )
    questions = Questions(task, seed)
    records = [Record(index, f"row {index + 1}", row) for index, row in enumerate(rows)]
    if task.few_shot:
        questions.learn(records, parser, same_rows=same_rows)
    return [questions.read(record, parser) for record in records]


@pytest.mark.parametrize(
    ("target", "value"), [("right answer", 5), ("level", "easy"), ("q.split()[0] | int", 2), ("[1, q]", [1, "2 + 3"])]
)
def test_a_target_is_a_column_or_an_expression(target: str, value: Any) -> None:
    [row] = read_all(Task(prompt_column="q", target=target), [COLUMNS])
    assert row.head.columns["target"] == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_column": "x"}, "--prompt-column names 'x'; the columns are: q, right answer, level"),
        ({"template": "{{ x }}"}, "--template names 'x'; the columns are: q, right answer, level"),
        ({"target": "x"}, "--target names 'x'; the columns are: q, right answer, level"),
        ({"target": "x.y + 1"}, "--target names 'x'; the columns are: q, right answer, level"),
        ({"target": None}, "no column target or answer: name one with --target; the columns are: q, right"),
        ({"group": "x"}, "--group names 'x'"),
        ({"target": "{{"}, "--target names '{{', which is no Jinja expression either"),
    ],
)
def test_what_a_command_gets_wrong_stops_it(settings: dict[str, Any], message: str) -> None:
    defaults = {} if "template" in settings else {"prompt_column": "q"}
    with pytest.raises(MinisglError) as caught:
        read_all(Task(**{**defaults, "target": "level", **settings}), [b'{"q": "a", "right answer": 5, "level": 1}'])
    assert message in str(caught.value)


def test_what_is_wrong_with_one_row_is_its_own_error() -> None:
    rows = [COLUMNS, b"not json", b'{"q": "a"}', b'{"q": 3, "level": 1}', b'{"q": "a", "level": null}', COLUMNS]
    read = read_all(Task(prompt_column="q", target="level"), rows)
    assert [type(row) for row in read] == [Row, BadRow, BadRow, BadRow, BadRow, Row]
    errors = [row.error.message for row in read if isinstance(row, BadRow)]
    assert "not JSON" in errors[0] and "level" in errors[1] and errors[3] == "the target is null"


def test_a_row_that_cannot_be_asked_counts_in_its_group() -> None:
    task = Task(prompt_column="q", group="kind")
    [_, bad] = read_all(task, [{"q": "a", "kind": "x", "answer": 1}, {"q": "b", "kind": "y", "answer": None}])
    assert isinstance(bad, BadRow) and bad.head.columns == {"prompt": "b", "group": "y"}


@pytest.mark.parametrize(
    ("target", "place"), [(1, 1), ("B", 1), ("yes", 1), ("1", None), ("C", None), (2, None), (-1, None), (True, None)]
)
def test_the_right_option(target: Any, place: int | None) -> None:
    task = Task(mode="choice", prompt_column="q", options='["no", "yes"]', target="t")
    [_, row] = read_all(task, [{"q": "a", "t": 0}, {"q": "a", "t": target}])
    if place is None:
        assert isinstance(row, BadRow) and "none of the 2 options" in row.error.message
    else:
        assert row.head.columns["target"] == [place]


QUESTIONS = [{"q": f"q{place}", "answer": f"a{place}"} for place in range(5)]


def test_examples_are_drawn_once_and_never_the_row_itself() -> None:
    task = Task(prompt_column="q", few_shot=2)
    rows = read_all(task, QUESTIONS)
    for place, row in enumerate(rows):
        assert isinstance(row, Row) and row.prompt is not None
        *examples, question = row.prompt.split("\n\n")
        assert question == f"q{place}" and len(examples) == 2
        assert all(
            example != f"q{place} a{place}" and example in {f"q{p} a{p}" for p in range(5)} for example in examples
        )
    assert rows == read_all(task, QUESTIONS) != read_all(task, QUESTIONS, seed=1)
    assert len({row.prompt.rpartition("\n\n")[0] for row in rows if isinstance(row, Row) and row.prompt}) <= 3


def test_examples_in_a_chat_are_turns() -> None:
    task = Task(prompt_column="q", few_shot=1, system="Be brief.", intro="Go. ", solution="answer ~ '!'")
    row = read_all(task, QUESTIONS[:2])[0]
    assert isinstance(row, Row)
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go. q1"},
        {"role": "assistant", "content": "a1!"},
        {"role": "user", "content": "q0"},
    ]


def test_examples_are_of_the_rows_group() -> None:
    rows = [{**row, "kind": "even" if place % 2 == 0 else "odd"} for place, row in enumerate(QUESTIONS)]
    read = read_all(Task(prompt_column="q", group="kind", few_shot=1), rows)
    for place, row in enumerate(read):
        assert isinstance(row, Row) and row.prompt is not None
        assert int(row.prompt[1]) % 2 == place % 2
    read = read_all(Task(prompt_column="q", group="kind", few_shot=2), rows)
    assert [type(row) for row in read] == [Row, BadRow, Row, BadRow, Row]
    assert isinstance(read[1], BadRow) and "the group 'odd' has 1 examples" in read[1].error.message


def test_an_example_of_a_choice_shows_the_right_option() -> None:
    task = Task(mode="choice", prompt_column="q", options='["no", "yes"]', target="1", few_shot=1)
    row = read_all(task, QUESTIONS[:2])[0]
    assert isinstance(row, Row) and row.prompt == "q1 yes\n\nq0"


def test_examples_of_rows_with_many_messages() -> None:
    row = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")], "answer": "b"}
    with pytest.raises(MinisglError, match="--few-shot needs rows with one text or one user message; row 1"):
        read_all(Task(few_shot=1), [row])
