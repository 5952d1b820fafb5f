"""Content and tool calls of an answer, apart from its text as it streams.

Knows what stands between calls. Does not know how formats mark them (`tool_formats`) or how one is read
(`call_readers`), nor which tools exist: a call of a tool that was not offered is a call, and the client's to refuse.
"""

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import regex

from minisgl.parsers.call_readers import JsonReader, NotACall, Reader, XmlReader
from minisgl.parsers.tool_formats import SHAPES, Shape

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolCall:
    """arguments: the JSON text of an object."""

    id: str
    name: str
    arguments: str


class ToolDelta(NamedTuple):
    """What a piece of text adds to the answer. Calls are whole, in the order in which they were written."""

    content: str
    calls: tuple[ToolCall, ...]


class _Reading(NamedTuple):
    """start: where the call begins in the text, behind what marks it."""

    shape: Shape
    start: int
    reader: Reader


class ToolCallParser:
    """The content and the calls of one answer. All content that `push` and then `finish` return, joined, is the answer
    without its calls, the white space before each and that at the end behind one. What looks like a call but is
    malformed, or not complete when the answer ends, is content as it was written.

    The marks of some formats are special tokens: decode with skip_special_tokens=False.
    """

    def __init__(self, format: str, tools: Sequence[Mapping[str, Any]] = ()):
        """`format`: what `find_format` or `ToolRequest.format` returned. `tools`: those offered, checked; their schemas
        say what the values of Qwen3-Coder's parameters are."""
        self._shapes = SHAPES[format]
        self._new_id = _mistral_id if format == "mistral" else _openai_id
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
        self._text = ""  # not yet content or call
        self._at_start = True  # nothing else has come
        self._follows_call = False  # nothing but white space has come since
        self._ended: Shape | None = None  # of the call that has just ended: what closes it may come, or another
        self._reading: _Reading | None = None

    def push(self, text: str) -> ToolDelta:
        """Add the next piece of the answer; returns what later text cannot change."""
        return self._read(text, is_last=False)

    def finish(self) -> ToolDelta:
        """The rest, when no more text comes."""
        return self._read("", is_last=True)

    def _read(self, text: str, is_last: bool) -> ToolDelta:
        self._text += text
        content, calls = list[str](), list[ToolCall]()
        goes_on = True
        while goes_on:
            if self._reading is not None:
                goes_on = self._read_call(self._reading, is_last, content, calls)
            elif self._ended is not None:
                goes_on = self._read_after(self._ended, is_last)
            else:
                goes_on = self._read_content(is_last, content)
        return ToolDelta("".join(content), tuple(calls))

    def _read_call(self, reading: _Reading, is_last: bool, content: list[str], calls: list[ToolCall]) -> bool:
        """False, here and in what follows, when more text must come first."""
        try:
            call = reading.reader.read(self._text)
            is_none = call is None and is_last
        except NotACall:
            call, is_none = None, True
        if call is not None:
            calls.append(ToolCall(self._new_id(), call.name, call.arguments))
            self._text = self._text[call.end :]
            self._ended, self._follows_call = reading.shape, True
        elif is_none:
            content.append(self._take(reading.start))  # the mark alone: calls may stand in what follows it
        else:
            return False
        self._reading, self._at_start = None, False
        return True

    def _read_after(self, shape: Shape, is_last: bool) -> bool:
        """What closes a call, or stands between two."""
        match = shape.after.match(self._text, partial=True)
        if match and match.partial and not is_last:
            return False
        self._ended = None
        if match and not match.partial:
            if match.lastgroup == "more":
                self._reading = self._open(shape, match.end(), None)
            else:
                self._text = self._text[match.end() :]
        return True

    def _read_content(self, is_last: bool, content: list[str]) -> bool:
        """What stands before a call, or before what may become one."""
        found = [(match.partial, match.start(), match, shape) for shape in self._shapes if (match := self._seek(shape))]
        is_partial, start, match, shape = min(found, key=itemgetter(0, 1), default=(True, len(self._text), None, None))
        if match is None or shape is None or is_partial:
            # white space before a call is not of the content
            content.append(self._take(len(self._text) if is_last else len(self._text[:start].rstrip())))
            return False
        size = len(self._text[:start].rstrip())
        content.append(self._take(size))
        self._reading = self._open(shape, match.end() - size, match.groupdict().get("name"))
        return True

    def _seek(self, shape: Shape) -> regex.Match[str] | None:
        """A mark of a call in the text, or the beginning of one at its end."""
        if not shape.at_start:
            return shape.opening.search(self._text, partial=True)
        return shape.opening.match(self._text, partial=True) if self._at_start else None

    def _open(self, shape: Shape, start: int, name: str | None) -> _Reading:
        if self._text[start] == "{":
            return _Reading(shape, start, JsonReader(start, name, shape.is_bare))
        return _Reading(shape, start, XmlReader(start, self._schemas))

    def _take(self, size: int) -> str:
        """The first characters of the text, which are content."""
        taken, self._text = self._text[:size], self._text[size:]
        if self._follows_call and taken.isspace():
            return ""
        if taken:
            self._at_start = self._follows_call = False
        return taken


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    """Mistral's templates refuse other ids when the call comes back in a conversation."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))
