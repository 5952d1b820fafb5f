"""What a request asks of the form of its answer, and the llguidance grammar that says the same.

    https://platform.openai.com/docs/api-reference/chat/create (response_format)
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md (Lark, with %json and named special tokens)

Knows the forms and whether they are well-formed. Whether a grammar makes sense is for llguidance to say (`compiler`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, cast

from minisgl.config import option
from minisgl.errors import RequestError

MAX_SOURCE_BYTES = 256 << 10
# Between two parts of a JSON text. Models that lost their way write white space for ever, which any amount would allow.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
NO_FORCING = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class ResponseFormat:
    """Exactly one of these; RequestError says what is wrong.

    json_schema: a JSON schema, as an object or as its text; properties come in the schema's order. What llguidance does
        not support is refused by the compiler, never ignored.
    json_object: True for any JSON object.
    regex: matches the whole answer; the syntax of Rust's regex crate without look-around, but \\d and \\w are ASCII.
    choice: the answer is one of these strings.
    grammar: Lark in llguidance's dialect, with a rule `start`; or GBNF (EBNF with `::=`), with a rule `root`.
    """

    json_schema: str | Mapping[str, Any] | None = option(None, "Answer in JSON of this schema.", or_file=True)
    json_object: bool = option(False, "Answer with a JSON object.")
    regex: str | None = option(None, "Answer with text that all of this matches.")
    choice: Sequence[str] | None = option(None, "Answer with this text, or another --choice.")
    grammar: str | None = option(None, "Answer with a text of this grammar: Lark, or GBNF.", or_file=True)

    def __post_init__(self) -> None:
        """Schema and choices become text and tuple, so that equal formats are equal and hashable."""
        if not isinstance(self.json_object, bool):
            _refuse(f"json_object is {self.json_object!r}; it must be true or false")
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            _refuse(f"give exactly one of {', '.join(names)}, not {' and '.join(given) or 'none'}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                _refuse(f"{name} is {text!r}; it must be a non-empty string")
        try:
            num_bytes = len(self.source.encode())
        except UnicodeEncodeError as error:
            _refuse(f"{self.kind} is not valid Unicode: {error.reason} at character {error.start}")
        if num_bytes > MAX_SOURCE_BYTES:
            _refuse(f"{self.kind} has {num_bytes:,} bytes; at most {MAX_SOURCE_BYTES:,} are allowed: make it smaller")

    @classmethod
    def from_openai(cls, value: Any) -> "ResponseFormat | None":
        """Of OpenAI's `response_format`, also with the types regex, grammar and choice; None of {"type": "text"}."""
        kind = value.get("type") if isinstance(value, Mapping) else None
        bodies: dict[str, tuple[str, ...]] = {"text": (), "json_object": ()}
        bodies |= {name: (name,) for name in ("json_schema", "regex", "choice", "grammar")}
        if not isinstance(kind, str) or kind not in bodies:
            _refuse(f'response_format must be an object whose "type" is one of {", ".join(bodies)}')
        _check_keys("response_format", value, required=bodies[kind])
        if kind == "text":
            return None
        if kind == "json_object":
            return cls(json_object=True)
        if kind != "json_schema":
            return cls(**{kind: value[kind]})
        body = value[kind]
        if not isinstance(body, Mapping):
            _refuse('response_format.json_schema must be an object such as {"name": "answer", "schema": {...}}')
        _check_keys("response_format.json_schema", body, ("schema",), optional=("name", "description", "strict"))
        if not isinstance(body.get("strict"), bool | None):
            _refuse(f"response_format.json_schema.strict is {body['strict']!r}; it must be true or false")
        return cls(json_schema=body["schema"])

    def to_openai(self) -> dict[str, Any]:
        """What `from_openai` makes this of; JSON has a form for all of it."""
        if self.json_object:
            return {"type": "json_object"}
        value = getattr(self, self.kind)
        return {"type": self.kind, self.kind: {"schema": json.loads(value)} if self.json_schema else value}

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(field.name for field in fields(self) if getattr(self, field.name) not in (None, False))

    @property
    def source(self) -> str:
        """What the caller wrote, in one text."""
        if self.json_object:
            return '{"type": "object"}'
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else "".join(value)

    def lark(self, special_texts: Sequence[str] = ()) -> str:
        """The grammar for llguidance, or GBNF where the caller gave that.

        special_texts: how special tokens are spelled. Where a text of the answer is the only one possible, llguidance
        asks for its tokens as the tokenizer splits it, which reads special tokens; a source that spells one must do
        without.
        """
        if self.grammar is not None:
            return self.grammar  # may name special tokens, and mean them
        from llguidance import regex_to_lark

        unescaped = self.source.replace("\\", "")
        header = NO_FORCING if any(text in unescaped for text in special_texts) else ""
        if self.regex is not None:
            return f"{header}start: TEXT\nTEXT: /{regex_to_lark(self.regex, 'dw')}/"
        if self.choice is not None:
            return f"{header}start: TEXT\nTEXT: {' | '.join(json.dumps(text) for text in self.choice)}"
        schema = json.loads(self.source)
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE} | schema.get("x-guidance", {})
        return f"{header}start: %json {json.dumps(schema)}"


def _schema_text(schema: Any) -> str:
    """Of an object or of JSON text; keys keep their order."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        _refuse(f"json_schema is not valid JSON: {error}")
    if not isinstance(schema, Mapping):
        _refuse(f"json_schema is {text[:40]}; it must be an object")
    if not isinstance(schema.get("x-guidance", {}), Mapping):
        _refuse('json_schema has an "x-guidance" that is not an object')
    return text


def _choices(choice: Any) -> tuple[str, ...]:
    if not isinstance(choice, list | tuple) or not choice or not all(isinstance(text, str) for text in choice):
        _refuse("choice must be a non-empty list of strings")
    return tuple(cast("Sequence[str]", choice))


def _check_keys(name: str, value: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    missing = [key for key in required if key not in value]
    unknown = sorted(map(str, set(value) - {"type", *required, *optional}))
    if missing:
        _refuse(f"{name} needs {missing[0]!r}")
    if unknown:
        _refuse(f"{name} has an unknown key {unknown[0]!r}; known ones: {', '.join([*required, *optional]) or 'type'}")


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_parameter")
