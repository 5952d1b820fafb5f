"""Reads one tool call from text that is still growing, in JSON or in Qwen3-Coder's XML.

Knows the two notations of a call. Does not know what stands around calls. Every character is looked at once, however
small the pieces are in which it comes: arguments may be whole files.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import regex  # for its partial matches; names are bounded, since they are matched anew with each piece

ARGUMENTS = ("parameters", "arguments")
KEYS = ("name", *ARGUMENTS, "type", "id")  # the last two are what models add

_FIRST_KEY = re.compile(r'\{\s*(?:"([^"\\]*)"|\})')
_PLAIN = re.compile(r"[\s\w:,.+-]*")  # what JSON has outside of strings and brackets
_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_FUNCTION = regex.compile(r"<function=(?P<name>[^<>\s]{1,64})>")
_PARAMETER = regex.compile(r"\s*(?:<parameter=(?P<key>[^<>\s]{1,256})>|</function>)")
_END = "</parameter>"
_PYTHON = {"True": True, "False": False, "None": None}  # as Qwen3-Coder's template writes them


class NotACall(Exception):
    """The text that looked like a call is none, whatever follows."""


class Call(NamedTuple):
    """arguments: the JSON text of an object. end: where the text goes on."""

    name: str
    arguments: str
    end: int


class Reader(Protocol):
    def read(self, text: str) -> Call | None:
        """The call, or None when it is not complete. NotACall. `text` is that of the call before, and more."""


class JsonReader:
    """{"name": ..., "arguments": {...}}, or the arguments alone when the name is known."""

    def __init__(self, start: int, name: str | None, is_bare: bool):
        """`is_bare`: an object is a call only if it has all that a call has, and nothing else."""
        self._start = self._at = start
        self._name, self._is_bare = name, is_bare
        self._depth, self._in_string = 0, False
        self._begins_well = name is not None

    def read(self, text: str) -> Call | None:
        if not self._begins_well:  # an answer in JSON is not held back to its end
            match = _FIRST_KEY.match(text, self._start)
            if match and match[1] not in KEYS:
                raise NotACall
            self._begins_well = match is not None
        while self._at < len(text):
            if self._in_string:
                self._at = _end(_STRING, text, self._at)
                if text[self._at : self._at + 1] != '"':
                    return None
                self._in_string = False
            else:
                self._at = _end(_PLAIN, text, self._at)
                char = text[self._at : self._at + 1]
                if not char:
                    return None
                if char not in '"{}[]':
                    raise NotACall
                self._in_string = char == '"'
                self._depth += (char in "{[") - (char in "}]")
            self._at += 1
            if self._depth == 0 and not self._in_string:
                return self._call(text[self._start : self._at])
        return None

    def _call(self, text: str) -> Call:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise NotACall from None
        if self._name is not None:
            return Call(self._name, _object_text(value), self._at)
        given = [value[key] for key in ARGUMENTS if key in value]
        if not isinstance(value.get("name"), str) or len(given) > 1:
            raise NotACall
        if self._is_bare and (not given or not set(value) <= set(KEYS)):
            raise NotACall
        return Call(value["name"], _object_text(given[0] if given else {}), self._at)


class XmlReader:
    """<function=NAME> <parameter=KEY> VALUE </parameter> ... </function>, with line breaks around values."""

    def __init__(self, start: int, tools: Mapping[str, Mapping[str, Any]]):
        """`tools`: each tool's JSON schema. A value is text where it is a string there, or not there at all; else it is
        JSON, or text when it is none."""
        self._at = self._searched = start
        self._tools = tools
        self._name: str | None = None
        self._key: str | None = None
        self._arguments: dict[str, Any] = {}

    def read(self, text: str) -> Call | None:
        while True:
            if self._key is None:
                match = (_FUNCTION if self._name is None else _PARAMETER).match(text, self._at, partial=True)
                if match is None:
                    raise NotACall
                if match.partial:
                    return None
                self._at = self._searched = match.end()
                if self._name is None:
                    self._name = match["name"]
                elif match["key"] is None:
                    return Call(self._name, _object_text(self._arguments), self._at)
                else:
                    self._key = match["key"]
                continue
            end = text.find(_END, self._searched)
            if end < 0:
                self._searched = max(self._at, len(text) - len(_END))
                return None
            self._arguments[self._key] = self._value(text[self._at : end].removeprefix("\n").removesuffix("\n"))
            self._key, self._at = None, end + len(_END)

    def _value(self, text: str) -> Any:
        properties = self._tools.get(self._name or "", {}).get("properties", {})
        schema = properties.get(self._key, {"type": "string"})
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if kind == "string" or (isinstance(kind, list) and "string" in kind and text != "null"):
            return text
        if text in _PYTHON:
            return _PYTHON[text]
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    assert match is not None, "these patterns match the empty text"
    return match.end()


def _object_text(value: Any) -> str:
    """The JSON text of an object, which some models write as text already. NotACall when it is no object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise NotACall from None
    if not isinstance(value, dict):
        raise NotACall
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value)
    except (ValueError, RecursionError):  # NaN and what is too large for a float are no JSON
        raise NotACall from None
    return text
