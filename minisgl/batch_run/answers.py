"""Output lines: an answered or failed row becomes one line of JSON, and a line is known again when a job goes on.

    id, index, text, [token_ids,] [reasoning,] [tool_calls,] finish_reason, [logprobs,] [samples,] [prompt_logprobs,]
    usage, error, key, and the columns that are carried over

Knows the schema of the output. Does not know files. A carried column that has a name of the output's, or of a column
that a table makes of them, gets "input_" before it.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from minisgl.batch_run import openai_batch
from minisgl.batch_run.parser import jsonable
from minisgl.batch_run.rows import Head, RowError, row_error
from minisgl.batch_run.tables import SPREAD
from minisgl.openai.answers import Spell, tool_call_object
from minisgl.request import Result, TokenLogprobs, Usage

NAMES = (
    *("id", "index", "text", "token_ids", "reasoning", "tool_calls", "finish_reason", "logprobs", "samples"),
    *("prompt_logprobs", "usage", "error", "key"),
)

TAKEN = {*NAMES, *(column for columns in SPREAD.values() for column in columns.values())}

# json.dumps leaves these raw, and str.splitlines (so many a reader) takes them for the end of the line.
_LINE_BREAKS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=jsonable)  # json.dumps makes one each time: 3 of a row's 60 us


@dataclass(frozen=True, slots=True)
class Line:
    """One output row; `data` is its JSON with the line end."""

    index: int
    key: int
    failed: bool
    data: bytes


def format_line(
    head: Head, outcome: list[Result] | RowError, *, return_token_ids: bool = False, spell: Spell | None = None
) -> Line:
    """The line of a row's samples, or of its error. Samples with an error of the engine's make an error line that
    keeps what they had. `spell`: the text of a token, which logprobs in OpenAI's form have."""
    results = [] if isinstance(outcome, RowError) else outcome
    failed = next((result.error for result in results if result.error), None)
    error = outcome if isinstance(outcome, RowError) else failed and row_error(failed.type, str(failed))
    if head.form != "row":
        values = openai_batch.answer_values(head, error or results, spell)
    else:
        values = _values(head, results or [Result("", [], "error", Usage())], error or None, return_token_ids)
    return Line(head.index, head.key, bool(error), dump(values))


def parse_line(data: bytes) -> Line | None:
    """A line of an output again, or None when it is no whole one."""
    try:
        values = json.loads(data)
        if "custom_id" in values and "response" in values:
            index, key, failed = openai_batch.read_mark(values)
        else:
            index, key, failed = int(values["index"]), int(values["key"], 16), values["error"] is not None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Line(index, key, failed, data) if data.endswith(b"\n") and index >= 0 and 0 < key < 2**64 else None


def relabel(line: bytes, head: Head) -> Line:
    """The answer of a row as that of another one, which asked the same."""
    values = json.loads(line)
    if head.form == "row":
        own = {"id": head.id, "index": head.index, "key": f"{head.key:016x}"}
        values = {name: values[name] for name in NAMES if name in values} | own | _carried(head)
    else:
        values = openai_batch.relabel(values, head)
    return Line(head.index, head.key, values["error"] is not None, dump(values))


def _values(head: Head, results: list[Result], error: RowError | None, return_token_ids: bool) -> dict[str, Any]:
    samples = [
        {
            "text": result.text,
            **({"token_ids": result.token_ids} if return_token_ids else {}),
            **({"reasoning": result.reasoning} if result.reasoning else {}),
            **({"tool_calls": [*map(tool_call_object, result.tool_calls)]} if result.tool_calls else {}),
            "finish_reason": "error" if error else result.finish_reason,
            **_logprobs("logprobs", result.logprobs),
        }
        for result in results
    ]
    usage = results[0].usage
    return {
        "id": head.id,
        "index": head.index,
        **samples[0],
        **({"samples": samples} if len(samples) > 1 else {}),
        **_logprobs("prompt_logprobs", results[0].prompt_logprobs),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": sum(result.usage.completion_tokens for result in results),
            "cached_tokens": usage.cached_tokens,
        },
        "error": None if error is None else {"type": error.type, "message": error.message},
        "key": f"{head.key:016x}",
        **_carried(head),
    }


def _logprobs(name: str, tokens: list[TokenLogprobs] | None) -> dict[str, Any]:
    return {} if tokens is None else {name: [asdict(token) for token in tokens]}


def _carried(head: Head) -> dict[str, Any]:
    carried = {}
    for name, value in head.columns.items():
        if name in TAKEN:
            while (name := f"input_{name}") in head.columns:
                pass
        carried[name] = value
    return carried


def dump(values: dict[str, Any]) -> bytes:
    """One line of JSON that any reader takes for one line."""
    line = _ENCODER.encode(values)
    for raw, escaped in () if line.isascii() else _LINE_BREAKS:
        line = line.replace(raw, escaped)
    # A lone surrogate of an id or a column becomes the JSON escape that it was in the input.
    return line.encode("utf-8", "backslashreplace") + b"\n"
