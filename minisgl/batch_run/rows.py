"""The schema of a row: what is asked, in which form, and the keys and checks of our own form.

Knows key names and their checks. Does not know files, models or tokens: whether ids are in the vocabulary or a prompt
fits the context is the engine's to say, for each request.

    prompt | messages | prompt_token_ids   exactly one of them
    id                                     string or number; default: the row's index, from 0
    n                                      samples of this row, 1 to 128
    any field of SamplingParams            wins over the flag; max_completion_tokens is another name of max_tokens
    tools, tool_choice, parallel_tool_calls, chat_template_kwargs   of messages
    anything else                          is carried over to the output

Two kinds of other keys are refused, since a parameter that is silently ignored costs a whole run: one that nearly is a
parameter's name, and one that names what other engines do and this one does not. null means "not given".
"""

import codecs
import json
import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NoReturn

from minisgl.errors import RequestError
from minisgl.messages import Message, normalize_messages
from minisgl.parsers import read_tools
from minisgl.request import HALF_PAIR, SamplingParams

RowId = str | int | float

SOURCES = ("prompt", "messages", "prompt_token_ids")
ALIASES = {"max_completion_tokens": "max_tokens"}
PARAMETERS = (*(name for name in SamplingParams.names() if name != "n"), *ALIASES)
TOOL_KEYS = ("tools", "tool_choice", "parallel_tool_calls")
CHAT_KEYS = (*TOOL_KEYS, "chat_template_kwargs")
KEYS = ("id", "n", *SOURCES, *PARAMETERS, *CHAT_KEYS)
UNSUPPORTED = (
    *("stream", "top_logprobs", "best_of", "use_beam_search", "num_beams", "beam_width", "length_penalty", "typical_p"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "allowed_token_ids"),
    *("logits_processors", "mirostat"),
)
MAX_SAMPLES = 128
MAX_DEPTH = 200  # lists and objects in each other; Python writes no more than some 900, less the deeper it is itself
NEARLY = 0.8  # difflib's ratio from which a key counts as a misspelt one
MAX_MESSAGE_CHARS = 500  # error messages quote values, and a value can be megabytes


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer. `type` is one of a few stable names that programs may compare.

    Of this package: invalid_json, invalid_row, invalid_parameter, invalid_prompt, invalid_messages, invalid_token_id,
    template_failed. The others are RequestError's.
    """

    type: str
    message: str


Value = bytes | str | dict[str, Any] | RowError  # of a record


@dataclass(frozen=True, slots=True)
class Record:
    """One row as a source gives it.

    value: the bytes of a line of JSON, a line of text, a table's row by column, or why it could not be read.
    """

    index: int
    place: str
    value: Value


@dataclass(frozen=True, slots=True)
class Head:
    """What an output line needs to know of its row.

    form: "row" is ours; "chat.completion" and "text_completion" are OpenAI's. model: the name such a line asked for.
    num_prompts: of a text_completion, which has as many answers to each.
    """

    index: int
    key: int
    id: RowId
    place: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    form: str = "row"
    model: str = ""
    num_prompts: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """A row that asks for `n` answers; exactly one of prompt, messages and prompt_token_ids is set.

    chat_options: of messages, what else ChatFormat.prompt is told. more_prompts: what else an OpenAI line with several
    prompts asks, for `n` answers each.
    """

    head: Head
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None
    n: int = 1
    chat_options: dict[str, Any] = field(default_factory=dict)
    more_prompts: tuple[str | list[int], ...] = ()

    @property
    def prompts(self) -> list[str | list[int]]:
        """All of its texts and lists of token ids; none for messages."""
        first = self.prompt if self.prompt is not None else self.prompt_token_ids
        return [] if first is None else [first, *self.more_prompts]

    @property
    def num_answers(self) -> int:
        return self.n * self.head.num_prompts


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be asked. Its id is the row's own when it could be read."""

    head: Head
    error: RowError


class RefusedRow(Exception):
    """A row is wrong; becomes its RowError."""

    def __init__(self, type: str, message: str):
        super().__init__(message)
        self.type = type


def row_error(type: str, message: str) -> RowError:
    """A RowError whose message is kept to a readable length."""
    return RowError(type, message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "...")


def refuse(message: str, type: str = "invalid_row") -> NoReturn:
    raise RefusedRow(type, message)


# -- reading JSON --


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether there are more than `depth` lists and objects in each other."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, (dict, list)) for one in level)


def load_json(line: bytes) -> Any:
    """The value of a line; RefusedRow for what is not one JSON value in UTF-8. NaN and infinities are read."""
    if line.startswith(codecs.BOM_UTF8):  # that of a file is gone; this one stands between two that were joined
        refuse("not JSON: a byte order mark at position 1", "invalid_json")
    try:
        value = _DECODER.decode(line.decode("utf-8"))
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}", "invalid_json")
    except json.JSONDecodeError as error:
        refuse(f"not JSON: {error.msg} at position {error.pos + 1}", "invalid_json")
    except RecursionError:
        refuse("not readable JSON: nested too deeply", "invalid_json")
    except ValueError:  # an integer of more digits than Python converts
        refuse("not readable JSON: a number has thousands of digits", "invalid_json")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        refuse(f"the key {twice!r} is given twice", "invalid_json")
    return items


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # json.loads makes one each time: 3 of a row's 60 us


# -- checks of single keys, for every form --


def read_id(value: Any) -> RowId:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        refuse(f"id must be a string or a number, not {kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        refuse("id must be a finite number")
    return value


def read_params(values: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The parameters among `values` over the defaults; null leaves one as it is."""
    given = {name: values[name] for name in PARAMETERS if values.get(name) is not None}
    for alias, name in ALIASES.items():
        if alias in given:
            if name in given:
                refuse(f"give {name} or {alias}, not both", "invalid_parameter")
            given[name] = given.pop(alias)
    try:
        return defaults.merge(given) if given else defaults
    except RequestError as error:
        refuse(str(error), error.type)


def read_chat_options(values: dict[str, Any]) -> dict[str, Any]:
    """What is said of tools and the chat template, as keyword arguments of ChatFormat.prompt."""
    options = {name: values[name] for name in TOOL_KEYS if values.get(name) is not None}
    try:
        read_tools(**options)
    except RequestError as error:
        refuse(str(error), error.type)
    kwargs = values.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        refuse(f"chat_template_kwargs must be an object, not {kind(kwargs)}", "invalid_parameter")
    return {**options, "template_kwargs": kwargs} if kwargs else options


def read_n(value: Any, default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SAMPLES:
        refuse(f"n is {value!r}; it must be an integer from 1 to {MAX_SAMPLES}", "invalid_parameter")
    return value


def read_question(values: dict[str, Any]) -> dict[str, Any]:
    """The one prompt among `values`, as the keyword argument of Row that it becomes."""
    sources = [key for key in SOURCES if values.get(key) is not None]
    if len(sources) != 1:
        what = f"has {' and '.join(sources)}" if sources else "has no prompt"
        refuse(f"the row {what}; give exactly one of {', '.join(SOURCES)}")
    readers = dict(zip(SOURCES, (read_prompt, read_messages, read_token_ids), strict=True))
    return {sources[0]: readers[sources[0]](values[sources[0]])}


def read_prompt(value: Any) -> str:
    if not isinstance(value, str):
        refuse(f"prompt must be a string, not {kind(value)}")
    lone = HALF_PAIR.search(value)
    if lone:
        refuse(
            f"prompt holds half of a surrogate pair (\\u{ord(lone[0]):04x}), which is not a character", "invalid_prompt"
        )
    return value


def read_messages(value: Any) -> list[Message]:
    """Messages as chat templates expect them."""
    try:
        return normalize_messages(value)
    except RequestError as error:
        refuse(str(error), error.type)


def read_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        refuse("prompt_token_ids must be a list with at least one id")
    for place, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool):
            refuse(f"prompt_token_ids[{place}] must be an integer, not {kind(token)}")
        if not 0 <= token < 2**31:  # numpy cannot even hold some of these
            refuse(f"prompt_token_ids[{place}] is {token}, outside of every vocabulary", "invalid_token_id")
    return value


@lru_cache(maxsize=4096)
def suspect(key: str) -> str:
    """Why a key that is no parameter may not be carried over as a label; "" when it may."""
    if key in UNSUPPORTED:
        return f"{key!r} is not supported; leave it out, or name the columns to carry over with --columns"
    near = get_close_matches(key, (*PARAMETERS, *SOURCES, *CHAT_KEYS), n=1, cutoff=NEARLY)
    if near:
        return f"unknown key {key[:80]!r}: did you mean {near[0]!r}? To carry it over, name it in --columns"
    return ""


def kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
