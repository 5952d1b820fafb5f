"""The schema of a row: what a line of the input may say, and what a line of the output says.

Knows: JSON, key names and their checks. Does not know files, models or tokens: whether ids are in the vocabulary or a
prompt fits the context is the engine's to say, for each request.

Input, one JSON object per line:

    prompt | messages | prompt_token_ids   exactly one of them
    id                                     string or number; default: the line's index, from 0
    any field of SamplingParams            wins over the flag; max_completion_tokens is another name of max_tokens
    metadata                               anything; not read, so labels can travel in the input

Any other key is refused: a misspelt parameter that is silently ignored costs a whole run. null means "not given".
"""

import json
import math
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from minisgl.errors import RequestError
from minisgl.request import Result, SamplingParams, Usage
from minisgl.tokenizer import check_messages

RowId = str | int | float
Message = dict[str, Any]

SOURCES = ("prompt", "messages", "prompt_token_ids")
ALIASES = {"max_completion_tokens": "max_tokens"}
PARAMETERS = (*SamplingParams.names(), *ALIASES)
KEYS = ("id", *SOURCES, *PARAMETERS, "metadata")
HINTS = {
    "model": "the model is chosen for the whole run with -m",
    "stream": "a batch is not streamed",
    "n": "repeat the row with another seed instead",
    "custom_id": "it is called 'id' here",
    "body": "put its keys into the row itself",
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "logit_bias", "response_format", "tools", "tool_choice")
        + ("presence_penalty", "frequency_penalty", "repetition_penalty"),
        "it is not supported; leave it out",
    ),
}
MAX_MESSAGE_CHARS = 500  # error messages quote values, and a value can be megabytes

# json.dumps leaves these raw, and str.splitlines (so many a reader) takes them for the end of the line.
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer. `type` is one of a few stable names that programs may compare.

    Of this module: invalid_json, invalid_row, invalid_parameter, invalid_prompt, invalid_messages, invalid_token_id.
    The others are RequestError's.
    """

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """A line that asks for an answer; exactly one of prompt, messages and prompt_token_ids is set."""

    index: int
    id: RowId
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be asked. `id` is the row's own when it could be read."""

    index: int
    id: RowId
    error: RowError


class _Refused(Exception):
    def __init__(self, type: str, message: str):
        super().__init__(message)
        self.type = type


def parse_row(line: bytes, index: int, defaults: SamplingParams) -> Row | BadRow:
    """Read one line; whatever its bytes are, the answer is a row or a bad row, never an exception.

    `defaults` are the parameters of rows that name none (the flags). Error types: invalid_json (the line is not one
    JSON value in UTF-8), invalid_row (it is, but not of a row's form), and invalid_prompt, invalid_messages,
    invalid_token_id and invalid_parameter (the value of that key).
    """
    row_id: RowId = index
    try:
        value = _load(line)
        if not isinstance(value, dict):
            _refuse(f"a row must be a JSON object, not {_kind(value)}")
        given = {key: item for key, item in value.items() if item is not None}
        row_id = _read_id(given.get("id", index))
        for key in value:
            if key not in KEYS:
                _refuse(_unknown_key(key))
        sources = [key for key in SOURCES if key in given]
        if len(sources) != 1:
            what = f"has {' and '.join(sources)}" if sources else "has no prompt"
            _refuse(f"the row {what}; give exactly one of {', '.join(SOURCES)}")
        prompt, messages, token_ids = (given.get(key) for key in SOURCES)
        return Row(
            index,
            row_id,
            _read_params({key: given[key] for key in PARAMETERS if key in given}, defaults),
            prompt=None if prompt is None else _read_prompt(prompt),
            messages=None if messages is None else _read_messages(messages),
            prompt_token_ids=None if token_ids is None else _read_token_ids(token_ids),
        )
    except _Refused as refused:
        return BadRow(index, row_id, row_error(refused.type, str(refused)))


def row_error(type: str, message: str) -> RowError:
    """A RowError whose message is kept to a readable length."""
    return RowError(type, message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "...")


def format_answer(index: int, id: RowId, result: Result, *, return_token_ids: bool) -> bytes:
    """The output line of an answered row."""
    token_ids = result.token_ids if return_token_ids else None
    return _format(index, id, result.text, token_ids, result.finish_reason, result.usage, None)


def format_error(
    index: int, id: RowId, error: RowError, *, return_token_ids: bool, result: Result | None = None
) -> bytes:
    """The output line of a row that failed; `result` holds what it had produced until then."""
    result = result or Result("", [], "error", Usage())
    token_ids = result.token_ids if return_token_ids else None
    return _format(index, id, result.text, token_ids, "error", result.usage, error)


def _format(
    index: int,
    id: RowId,
    text: str,
    token_ids: list[int] | None,
    finish_reason: str,
    usage: Usage,
    error: RowError | None,
) -> bytes:
    row = {
        "id": id,
        "index": index,
        "text": text,
        **({} if token_ids is None else {"token_ids": token_ids}),
        "finish_reason": finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "error": None if error is None else {"type": error.type, "message": error.message},
    }
    line = json.dumps(row, ensure_ascii=False).translate(_LINE_BREAKS)
    # A lone surrogate of an id becomes the JSON escape that it was in the input.
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _refuse(message: str, type: str = "invalid_row") -> NoReturn:
    raise _Refused(type, message)


def _load(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        _refuse(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}", "invalid_json")
    except json.JSONDecodeError as error:
        _refuse(f"not JSON: {error.msg} at position {error.pos + 1}", "invalid_json")
    except RecursionError:
        _refuse("not readable JSON: nested too deeply", "invalid_json")
    except ValueError:  # an integer of more digits than Python converts
        _refuse("not readable JSON: a number has thousands of digits", "invalid_json")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        _refuse(f"the key {twice!r} is given twice", "invalid_json")
    return items


def _no_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON; use null or leave the key out", "invalid_json")


def _unknown_key(key: str) -> str:
    near = get_close_matches(key, KEYS, n=1)
    hint = HINTS.get(key) or (f"did you mean {near[0]!r}?" if near else "put labels under 'metadata'")
    return f"unknown key {key[:80]!r}: {hint}; known keys: {', '.join(KEYS)}"


def _read_id(value: Any) -> RowId:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        _refuse(f"id must be a string or a number, not {_kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse("id must be a finite number")
    return value


def _read_params(values: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    for alias, name in ALIASES.items():
        if alias in values:
            if name in values:
                _refuse(f"give {name} or {alias}, not both", "invalid_parameter")
            values[name] = values.pop(alias)
    try:
        return defaults.merge(values) if values else defaults
    except RequestError as error:
        _refuse(str(error), "invalid_parameter")


def _read_prompt(value: Any) -> str:
    if not isinstance(value, str):
        _refuse(f"prompt must be a string, not {_kind(value)}")
    lone = _SURROGATE.search(value)  # json.loads joins pairs, so what is left has no partner
    if lone:
        _refuse(
            f"prompt holds half of a surrogate pair (\\u{ord(lone[0]):04x}), which is not a character", "invalid_prompt"
        )
    return value


def _read_messages(value: Any) -> list[Message]:
    """Checked messages; OpenAI's list of text parts becomes one string."""
    if isinstance(value, list):
        value = [{**item, "content": _join_parts(item)} if isinstance(item, dict) else item for item in value]
    try:
        check_messages(value)
    except RequestError as error:
        _refuse(str(error), error.type)
    messages: list[Message] = value
    return messages


def _join_parts(message: Message) -> Any:
    content = message.get("content")
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            _refuse(
                'a content part must be {"type": "text", "text": "..."}; only text is supported', "invalid_messages"
            )
    return "".join(part["text"] for part in content)


def _read_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        _refuse("prompt_token_ids must be a list with at least one id")
    for place, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool):
            _refuse(f"prompt_token_ids[{place}] must be an integer, not {_kind(token)}")
        if not 0 <= token < 2**31:  # numpy cannot even hold some of these
            _refuse(f"prompt_token_ids[{place}] is {token}, outside of every vocabulary", "invalid_token_id")
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
