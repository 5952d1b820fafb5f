"""Records become rows: which columns make the prompt, which are parameters, which are carried over.

Knows the forms that a row may have. Does not know where records come from or what becomes of rows.
"""

import base64
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minisgl.batch_run.files import read_text
from minisgl.batch_run.openai_batch import is_batch_line, read_batch_head, read_batch_row
from minisgl.batch_run.rows import (
    KEYS,
    SOURCES,
    BadRow,
    Head,
    Record,
    RefusedRow,
    Row,
    RowError,
    RowId,
    Value,
    kind,
    load_json,
    read_chat_options,
    read_id,
    read_messages,
    read_n,
    read_params,
    read_prompt,
    read_question,
    refuse,
    row_error,
    suspect,
)
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams


class Template:
    """A Jinja template over a row's columns, in Jinja's sandbox. MinisglError when it cannot be compiled.

    text: the template. names: the columns that it reads.
    """

    def __init__(self, source: str):
        """`source` is the name of a file, or the template itself."""
        from jinja2 import StrictUndefined, TemplateError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.text = read_text(source, "--template") or source
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            self.names = meta.find_undeclared_variables(environment.parse(self.text))
            self._template = environment.from_string(self.text)
        except TemplateError as error:
            raise MinisglError(f"--template cannot be read: {error}") from error

    def render(self, columns: dict[str, Any]) -> str:
        """The text of one row; RefusedRow when the template fails on it, as it may in any way."""
        try:
            return self._template.render(columns)
        except Exception as error:
            refuse(f"the template failed: {error}", "template_failed")


class RowParser:
    """Makes a row of every record. Whatever a record holds, the answer is a row or a bad row, never an exception, but
    for a table without the columns that make the prompt: that is the command's mistake, a MinisglError."""

    def __init__(
        self,
        defaults: SamplingParams,
        *,
        n: int = 1,
        chat: bool | None = None,
        system: str | None = None,
        prompt_column: str | None = None,
        template: Template | None = None,
        columns: Sequence[str] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        hash_key: bytes = b"",
    ):
        """`defaults`, `n` and `template_kwargs` are for rows that name none (the flags). `chat`: True makes prompts
        messages of the user, False refuses messages. `columns`: what is carried over (None: all that is not used).
        `hash_key`, up to 64 bytes, stands for everything else that the answers depend on.
        """
        if system is not None and chat is False:
            raise MinisglError("--system needs the chat template, and --no-chat turns it off: leave one of them out")
        if prompt_column is not None and template is not None:
            raise MinisglError("give --prompt-column or --template, not both")
        self.defaults, self.n, self.chat, self.system = defaults, n, chat, system
        self.prompt_column, self.template, self.columns = prompt_column, template, columns
        self.missing_columns = set(columns or ())  # that no row has had so far
        self.template_kwargs = template_kwargs or {}
        self.hash_key = hash_key

    def parse(self, record: Record) -> Row | BadRow:
        index, place, value = record.index, record.place, record.value
        head = Head(index, self.key(value), index, place)
        try:
            values = self.load(value)
            if is_batch_line(values):
                head = read_batch_head(values, head)
                return self._with_chat(read_batch_row(values, head, self.defaults, self.n))
            if isinstance(value, dict):
                self.check_table(value)
            if self.template or self.prompt_column is not None:
                question, used = self._map(values)
                head = Head(index, head.key, _lenient_id(values, index), place, self._carry(values, used))
                return self._with_chat(Row(head, self.defaults, n=self.n, **question))
            id_ = values.get("id")
            head = Head(index, head.key, index if id_ is None else read_id(id_), place, self._carry(values, {*KEYS}))
            self._check_keys(values)
            params, n = read_params(values, self.defaults), read_n(values.get("n"), self.n)
            options = read_chat_options(values)
            return self._with_chat(Row(head, params, n=n, chat_options=options, **read_question(values)))
        except RefusedRow as refused:
            return BadRow(head, row_error(refused.type, str(refused)))

    def load(self, value: Value) -> dict[str, Any]:
        """The columns of a record; RefusedRow when it has none."""
        if isinstance(value, RowError):
            refuse(value.message, value.type)
        if isinstance(value, str):
            return {self.prompt_column or "text": value} if self.template or self.prompt_column else {"prompt": value}
        values = load_json(value) if isinstance(value, bytes) else value
        if not isinstance(values, dict):
            refuse(f"a row must be a JSON object, not {kind(values)}")
        return values

    def check_table(self, table: dict[str, Any]) -> None:
        """MinisglError when flags name columns that a table has not, or none of them makes the prompt."""
        named = {
            "--template": self.template.names if self.template else (),
            "--prompt-column": () if self.prompt_column is None else (self.prompt_column,),
            "--columns": self.columns or (),
        }
        has = f"the columns are: {', '.join(map(str, table))}"
        for flag, names in named.items():
            for name in sorted(names):
                if name not in table:
                    raise MinisglError(f"{flag} names {name!r}; {has}")
        if not (self.template or self.prompt_column is not None or any(name in table for name in SOURCES)):
            raise MinisglError(
                "the table has no column prompt: name one with --prompt-column or make prompts with --template; " + has
            )

    def _map(self, values: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """The prompt that --template or --prompt-column makes of a row, and the columns that went into it."""
        if self.template:
            return {"prompt": read_prompt(self.template.render(values))}, self.template.names
        column = str(self.prompt_column)
        if column not in values:
            refuse(f"--prompt-column names {column!r}; the columns are: {', '.join(map(str, values))}")
        value = values[column]
        question = {"messages": read_messages(value)} if isinstance(value, list) else {"prompt": read_prompt(value)}
        return question, {column}

    def _with_chat(self, row: Row) -> Row:
        """The row as --chat, --no-chat and --system want it."""
        if row.messages is not None and self.chat is False:
            refuse("messages need the chat template, and --no-chat turns it off", "invalid_messages")
        messages = row.messages
        if row.prompt is not None and row.head.form == "row" and (self.chat or self.system is not None):
            messages = [{"role": "user", "content": row.prompt}]
        if messages is None:
            if row.chat_options:
                refuse("tools and chat_template_kwargs need messages; --chat makes messages of prompts")
            return row
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        options = row.chat_options
        if self.template_kwargs:
            options = {**options, "template_kwargs": self.template_kwargs | options.get("template_kwargs", {})}
        return replace(row, prompt=None, messages=messages, chat_options=options)

    def _carry(self, values: dict[str, Any], used: set[str]) -> dict[str, Any]:
        if self.columns is not None:
            carried = {name: values[name] for name in self.columns if name in values}
            self.missing_columns.difference_update(carried)
            return carried
        return {name: value for name, value in values.items() if name not in used and name != "id"}

    def _check_keys(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if value is None or key in KEYS or (self.columns is not None and key in self.columns):
                continue
            if reason := suspect(key):
                refuse(reason)

    def key(self, value: Value) -> int:
        """64 bits of the row's content and of what else its answer depends on; never 0."""
        if isinstance(value, dict):
            value = json.dumps(value, sort_keys=True, default=jsonable)
        content = repr(value).encode() if isinstance(value, RowError) else value
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=self.hash_key).digest(), "big") or 1


def question_hash(row: Row) -> bytes:
    """Equal for rows that ask the same with the same parameters, whatever else they carry."""
    content = repr((row.prompts, row.messages, row.params, row.n, row.chat_options, row.head.form))
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def jsonable(value: Any) -> Any:
    """What stands in JSON for the values of tables that it has no type for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _lenient_id(values: dict[str, Any], index: int) -> RowId:
    """A data set's own id, if it has one that is of use."""
    try:
        return read_id(values.get("id", index))
    except RefusedRow:
        return index
