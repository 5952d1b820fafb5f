r"""How model families write tool calls, as patterns around the calls themselves.

    hermes, qwen   <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>
                   <tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>    (Qwen3-Coder)
    llama3         {"name": "f", "parameters": {...}}; {...}     at the beginning, or <|python_tag|> and the same
    mistral        [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
                   [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}
    json           [{"name": "f", "arguments": {...}}, ...]      at the beginning: what `forcing_grammar` forces

Knows where calls begin and end in text. Does not know how to read one (`call_readers`).
"""

from dataclasses import dataclass

import regex  # for its partial matches: they say what may still become a call

from minisgl.errors import MinisglError

FORMATS = ("auto", "hermes", "qwen", "llama3", "mistral", "none")


@dataclass(frozen=True)
class Shape:
    """opening: what stands before a call; its group `name`, if it has one, is the call's, and arguments follow alone.
    after: what stands behind a call; its group `more` when another call follows.
    at_start: only the beginning of an answer is looked at. is_bare: no mark tells a call from an answer in JSON.
    """

    opening: regex.Pattern[str]
    after: regex.Pattern[str]
    at_start: bool = False
    is_bare: bool = False


def _shape(opening: str, after: str, *, at_start: bool = False, is_bare: bool = False) -> Shape:
    return Shape(regex.compile(opening), regex.compile(after), at_start, is_bare)


_NAME = r"(?P<name>[\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?"  # bounded: it is matched anew with each piece
_LIST = r"(?P<more>\s*,\s*(?=\{))|\s*\]"
_NEXT = r"(?P<more>\s*;\s*(?=\{))"
_NOTHING = r"(?!)"

_TAGGED = (_shape(r"<tool_call>\s*(?=\{|<function=)", r"\s*</tool_call>"),)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "hermes": _TAGGED,
    "qwen": _TAGGED,
    "llama3": (
        _shape(r"<\|python_tag\|>\s*(?=\{)", _NEXT),
        _shape(r"\s*(?=\{)", _NEXT, at_start=True, is_bare=True),
    ),
    "mistral": (
        _shape(r"\[TOOL_CALLS\]\s*\[\s*(?=\{)", _LIST),
        _shape(rf"\[TOOL_CALLS\]\s*(?:{_NAME}\s*)?(?=\{{)", _NOTHING),
    ),
    "json": (_shape(r"\s*\[\s*(?=\{)", _LIST, at_start=True),),
    "none": (),
}


def find_format(name: str, chat_template: str) -> str:
    """The key of SHAPES that `name`, one of FORMATS, stands for with this template. MinisglError for another name.

    auto finds the mark of a format in the template; none when the template shows no tool calls.
    """
    if name in FORMATS and name != "auto":
        return name
    if name != "auto":
        raise MinisglError(f"tool-call parser {name!r} is not known; choose one of: {', '.join(FORMATS)}")
    marks = {"[TOOL_CALLS]": "mistral", "<tool_call>": "qwen", "<|python_tag|>": "llama3", '"parameters": ': "llama3"}
    return next((format for mark, format in marks.items() if mark in chat_template), "none")
