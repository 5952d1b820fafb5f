"""Records become questions: rows of the batch runner with a target, options, a group and solved examples before them.

    columns of a question's head   prompt, target, options (mode choice), group

Knows a task's expressions and how examples are drawn. How a record's own prompt is read is the row parser's to know;
answers are looked at elsewhere.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisgl.batch_run.parser import RowParser, Template
from minisgl.batch_run.rows import BadRow, Record, RefusedRow, Row, kind, refuse, row_error
from minisgl.errors import MinisglError
from minisgl.evaluate.extract import as_text
from minisgl.evaluate.task import Task

POOL_ROWS = 10_000  # examples are drawn from the first ones of their split, which is read before the first question
TARGETS = ("target", "answer")  # columns that are the target where none is named
EXAMPLE_GAP = "\n\n"

Example = tuple[int, str, str]  # index of its row, prompt, solution


class Expression:
    """A column by its name, or a Jinja expression over the columns, in Jinja's sandbox."""

    def __init__(self, source: str, setting: str):
        self.source, self.setting = source, setting
        self._problem = ""
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            self._names = meta.find_undeclared_variables(environment.parse("{{" + source + "}}"))
            self._evaluate = environment.compile_expression(source, undefined_to_none=False)
        except TemplateError as error:  # it may still be a column, such as "right answer"
            self._names, self._problem = {source}, f", which is no Jinja expression either ({error})"

    def __call__(self, columns: dict[str, Any]) -> Any:
        """The value for one row; RefusedRow when it has none."""
        if self.source in columns:
            return columns[self.source]
        if missing := self.missing(columns):
            refuse(missing)
        try:
            value = self._evaluate(**columns)
        except Exception as error:  # an expression may fail on a row in any way
            refuse(f"{self.setting} {self.source!r} failed: {error}")
        if isinstance(value, Undefined):
            refuse(f"{self.setting} {self.source!r} is undefined: a key or an item that is not there")
        return value

    def missing(self, columns: dict[str, Any]) -> str:
        """In words, what it reads and the columns do not have; "" when they have it all."""
        names = [] if self.source in columns else sorted(self._names - set(columns))
        if not names:
            return ""
        return f"{self.setting} names {names[0]!r}{self._problem}; the columns are: {', '.join(map(str, columns))}"


class Questions:
    """Makes a question of every record: a row or a bad row, never an exception, but MinisglError where the first record
    has not the columns that the task names: that is the command's mistake."""

    def __init__(self, task: Task, seed: int):
        self.task, self.seed = task, seed
        self._intro = Template(task.intro) if task.intro is not None else None
        self._group = _expression(task, "group")
        self._solution = _expression(task, "solution")
        self._target = _expression(task, "target")
        self._options = _expression(task, "options")
        self._checked = False
        self._examples: dict[str, list[Example]] = {}  # by group

    def learn(self, records: Iterable[Record], parser: RowParser, *, same_rows: bool) -> None:
        """Draw each group's examples; one more where they are questions too, so that each of these has K others."""
        pools: dict[str, list[Example]] = {}
        for record in records:
            row = self.read(record, parser, learning=True)
            if isinstance(row, Row):
                index = record.index if same_rows else -1
                example = (index, _question(row), row.head.columns["solution"])
                pools.setdefault(row.head.columns.get("group", ""), []).append(example)
        wanted = self.task.few_shot + same_rows
        for group, pool in pools.items():
            self._examples[group] = Random(f"{self.seed} {group}").sample(pool, min(wanted, len(pool)))

    def examples_hash(self) -> str:
        return hashlib.sha256(json.dumps(self._examples, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:16]

    def read(self, record: Record, parser: RowParser, *, learning: bool = False) -> Row | BadRow:
        """The question of a record; with `learning` it has no examples, and its head's columns have the solution."""
        try:
            columns = parser.load(record.value)
        except RefusedRow:
            return parser.parse(record)
        if not self._checked:
            self._check(columns)
            parser.check_table(columns)  # of any input: columns that are missing are an error at once
            self._checked = True
        row = parser.parse(record)
        if isinstance(row, BadRow):
            return row
        asked: dict[str, Any] = {"prompt": row.messages if row.prompt is None else row.prompt}
        try:
            return self._ask(row, columns, learning, asked)
        except RefusedRow as refused:  # what is known of it is shown, and counts in its group
            return BadRow(replace(row.head, columns=asked), row_error(refused.type, str(refused)))

    def _check(self, columns: dict[str, Any]) -> None:
        if self._target is None and self.task.mode != "ppl":
            named = next((name for name in TARGETS if name in columns), None)
            if named is None:
                raise MinisglError(
                    "there is no column target or answer: name one with --target; the columns are: "
                    + ", ".join(map(str, columns))
                )
            self._target = Expression(named, "--target")
        for expression in (self._target, self._options, self._group, self._solution):
            if expression and (missing := expression.missing(columns)):
                raise MinisglError(missing)

    def _ask(self, row: Row, columns: dict[str, Any], learning: bool, asked: dict[str, Any]) -> Row:
        """The question; `asked` gets what is found out about it, for its head's columns."""
        if self._group:
            asked["group"] = as_text(self._group(columns))
        if self._target:
            asked["target"] = _target(self._target(columns))
        if self.task.mode == "choice":
            asked["options"] = self._read_options(columns)
            asked["target"] = [right_option(target, asked["options"]) for target in _listed(asked["target"])]
        if learning:
            asked["solution"] = self._solve(asked, columns)
        elif self.task.few_shot or self._intro:
            row = self._with_examples(row, asked.get("group", ""), columns)
            asked["prompt"] = row.messages if row.prompt is None else row.prompt
        return replace(row, head=replace(row.head, columns=asked))

    def _read_options(self, columns: dict[str, Any]) -> list[str | list[str]]:
        assert self._options is not None  # the task's own check
        value = self._options(columns)
        if not isinstance(value, (list, tuple)) or not value:
            what = "an empty list" if value in ([], ()) else kind(value)
            refuse(f"the options are {what}; they must be a list with at least one answer")
        return [[str(part) for part in one] if isinstance(one, (list, tuple)) else as_text(one) for one in value]

    def _solve(self, asked: dict[str, Any], columns: dict[str, Any]) -> str:
        if self._solution:
            return as_text(self._solution(columns))
        target = _listed(asked["target"])[0]
        if self.task.mode != "choice":
            return as_text(target)
        option = asked["options"][target]
        return option if isinstance(option, str) else self.task.separator.join(option)

    def _with_examples(self, row: Row, group: str, columns: dict[str, Any]) -> Row:
        """The row behind its examples: in front of the text, or as turns before the user's."""
        examples = [one for one in self._examples.get(group, []) if one[0] != row.head.index][: self.task.few_shot]
        if len(examples) < self.task.few_shot:
            where = f"the group {group!r} has" if group else "there are"
            refuse(f"{where} {len(examples)} examples, fewer than --few-shot {self.task.few_shot}")
        intro = self._intro.render(columns) if self._intro else ""
        if row.prompt is not None:
            shown = [prompt + self.task.separator + solution for _, prompt, solution in examples]
            return replace(row, prompt=intro + EXAMPLE_GAP.join([*shown, row.prompt]))
        if row.messages is None:
            refuse("examples and an intro need a prompt of text or messages, not token ids")
        turns = [
            {"role": role, "content": content}
            for _, prompt, solution in examples
            for role, content in (("user", prompt), ("assistant", solution))
        ]
        first = 1 if row.messages[0]["role"] == "system" else 0
        turns = [*turns, *row.messages[first:]]
        turns[0] = {**turns[0], "content": intro + turns[0]["content"]}
        return replace(row, messages=[*row.messages[:first], *turns])


def right_option(target: Any, options: list[str | list[str]]) -> int:
    """The place of the right option, which may be named by its place, its letter or its text; RefusedRow otherwise."""
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(options):
        return target
    text = as_text(target)
    if text in options:
        return options.index(text)
    if len(text) == 1 and 0 <= ord(text) - ord("A") < len(options):
        return ord(text) - ord("A")
    refuse(f"the target {text[:80]!r} is none of the {len(options)} options, by place, letter or text")


def _question(row: Row) -> str:
    """What an example shows of its row: the text, or the one message of the user."""
    asked = [message for message in row.messages or [] if message["role"] != "system"]
    if row.prompt is None and len(asked) != 1:
        raise MinisglError(f"--few-shot needs rows with one text or one user message; {row.head.place} has another")
    return row.prompt if row.prompt is not None else str(asked[0]["content"])


def _expression(task: Task, setting: str) -> Expression | None:
    source = getattr(task, setting)
    return Expression(source, "--" + setting) if isinstance(source, str) else None


def _target(value: Any) -> Any:
    if value is None:
        refuse("the target is null")
    return list(value) if isinstance(value, tuple) else value


def _listed(value: Any) -> list[Any]:
    if value == []:
        refuse("the target is an empty list")
    return value if isinstance(value, list) else [value]
