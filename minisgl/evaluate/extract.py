"""Answers out of text, and whether one is right. Pure functions of strings; knows no rows and no models.

extract   text | number | letter | code | json:FIELD | regex:PATTERN         None where there is no answer
match     exact | normalised | contains | number | instructions | python     the last two in modules of their own
"""

import json
import math
import re
import string
from collections.abc import Callable
from typing import Any

from minisgl.errors import MinisglError

MATCHES = ("exact", "normalised", "contains", "number", "instructions", "python")

_NUMBER = re.compile(r"(?<![\w.])[-+]?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_STATED_LETTER = re.compile(r"(?i:answer(?:\s+is)?)\s*:?[\s*(\[\"']*([A-Z])\b(?!')")
_FIRST_LETTER = re.compile(r"\A[\s*\"']*([A-Z])(?:[).:,*\]\"']|\s*$)", re.MULTILINE)
_MARKED_LETTER = re.compile(r"[(\[*]([A-Z])[)\]*]")
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Extractor:
    """The rule of one `extract` setting. MinisglError when there is no such rule."""

    def __init__(self, rule: str):
        kind, _, argument = rule.partition(":")
        rules: dict[str, Callable[[str], Any]] = {
            "text": lambda text: text.strip() or None,
            "number": last_number,
            "letter": choice_letter,
            "code": code_block,
            "json": lambda text: json_field(text, argument),
            "regex": self._search,
        }
        if kind not in rules or bool(argument) != (kind in ("json", "regex")):
            raise MinisglError(
                f"extract is {rule!r}; it must be text, number, letter, code, json:FIELD or regex:PATTERN"
            )
        if kind == "regex":
            try:
                self._pattern = re.compile(argument, re.MULTILINE)
            except re.error as error:
                raise MinisglError(f"extract: {argument!r} is no regular expression: {error}") from error
        self._rule = rules[kind]

    def __call__(self, text: str) -> Any:
        """The answer in the text, a string but for JSON; None when there is none."""
        return self._rule(text)

    def _search(self, text: str) -> str | None:
        """The last match: its first group, if the pattern has one."""
        *_, last = [None, *self._pattern.finditer(text)]
        if last is None:
            return None
        part: str | None = last[1] if self._pattern.groups else last[0]
        return part and part.strip()


def last_number(text: str) -> str | None:
    """The last number as it is written, without currency signs and thousands separators."""
    found = _NUMBER.findall(text)
    return re.sub(r"[$€£,+]", "", found[-1]) if found else None


def choice_letter(text: str) -> str | None:
    """The letter of the option that the text chooses: the last "answer is (B)", a first "B." or "B", the last "(B)"."""
    stated = _STATED_LETTER.findall(text)
    if stated:
        return str(stated[-1])
    first = _FIRST_LETTER.match(text)
    if first:
        return first[1]
    marked = _MARKED_LETTER.findall(text)
    return str(marked[-1]) if marked else None


def code_block(text: str) -> str | None:
    """The first fenced block of code, or the text itself, whose indentation matters, where there is none."""
    fenced = _FENCED.search(text)
    code = fenced[1] if fenced else text
    return code if code.strip() else None


def json_field(text: str, path: str) -> Any:
    """The value at `path` ("a.b" is b of a) of the first JSON object in the text that has it."""
    decode = json.JSONDecoder().raw_decode
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decode(text, start)
            for key in path.split("."):
                value = value[key]
            return value
        except (ValueError, KeyError, TypeError, RecursionError):
            start = text.find("{", start + 1)
    return None


def is_right(answer: Any, target: Any, match: str, tolerance: float) -> bool:
    """Whether an answer is the target, or one of them; ValueError when the target cannot be compared so."""
    if isinstance(target, list):
        # every target is looked at, so that one that cannot be compared is found
        return any([is_right(answer, one, match, tolerance) for one in target])
    if match == "number":
        wanted, given = number(target), number(answer)
        if wanted is None:
            raise ValueError(f"the target {as_text(target)[:80]!r} is not a number")
        return given is not None and math.isclose(given, wanted, rel_tol=0, abs_tol=tolerance * max(1.0, abs(wanted)))
    given_text, wanted_text = as_text(answer).strip(), as_text(target).strip()
    if match == "exact":
        return given_text == wanted_text
    given_text, wanted_text = normalised(given_text), normalised(wanted_text)
    return wanted_text in given_text if match == "contains" else given_text == wanted_text


def number(value: Any) -> float | None:
    """The number that a value is or that its text ends with; None when there is none, or no finite one."""
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    found = last_number(value) if isinstance(value, str) else None
    return float(found) if found else None


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and spare spaces, as in SQuAD (Rajpurkar et al., 2016)."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def as_text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
