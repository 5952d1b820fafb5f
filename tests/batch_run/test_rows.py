"""Whatever a line's bytes are, RowParser gives a row or a bad row, and both have an output line that is JSON."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.batch_run.answers import Line, format_line, parse_line
from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.rows import (
    KEYS,
    MAX_MESSAGE_CHARS,
    BadRow,
    Head,
    Record,
    Row,
    row_error,
)
from minisgl.request import Result, SamplingParams, Usage

FLAGS = SamplingParams(max_tokens=5, temperature=0.5)


def parse(value: Any) -> Row | BadRow:
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    return RowParser(FLAGS).parse(Record(3, "line 4", line))


def good(value: Any) -> Row:
    row = parse(value)
    assert isinstance(row, Row), row
    return row


def refused(value: Any) -> BadRow:
    row = parse(value)
    assert isinstance(row, BadRow), row
    return row


def test_the_three_prompts() -> None:
    assert good({"prompt": "Hello"}).prompt == "Hello"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert good({"messages": messages}).messages == messages
    assert good({"prompt_token_ids": [1, 2, 3]}).prompt_token_ids == [1, 2, 3]


def test_id_defaults_to_the_index() -> None:
    assert good({"prompt": "x"}).head.id == 3
    assert good({"prompt": "x", "id": None}).head.id == 3
    assert good({"prompt": "x", "id": "a-7"}).head.id == "a-7"
    assert good({"prompt": "x", "id": 0}).head.id == 0
    assert good({"prompt": "x", "id": 1.5}).head.id == 1.5


def test_parameters_of_the_row_win_over_the_flags() -> None:
    assert good({"prompt": "x"}).params == FLAGS
    assert good({"prompt": "x", "max_tokens": 9}).params == SamplingParams(max_tokens=9, temperature=0.5)
    assert good({"prompt": "x", "temperature": 0}).params.temperature == 0
    assert good({"prompt": "x", "temperature": None}).params.temperature == 0.5
    assert good({"prompt": "x", "max_completion_tokens": 9}).params.max_tokens == 9
    assert good({"prompt": "x", "stop": ["."], "stop_token_ids": [4]}).params.stop == (".",)


def test_other_keys_are_carried_over() -> None:
    labels = {"metadata": {"expected": "42", "max_tokens": -1}, "model": "m", "label": float("inf")}
    row = good({"prompt": "x", **labels})
    assert row.params == FLAGS
    assert row.head.columns == labels


def test_n() -> None:
    assert (good({"prompt": "x"}).n, good({"prompt": "x", "n": 3}).n) == (1, 3)


def test_the_key_is_of_the_content() -> None:
    keys = {good({"prompt": "x", **more}).head.key for more in ({}, {"seed": 1}, {"label": 1}, {"id": 1})}
    assert len(keys) == 4 and 0 not in keys
    assert good({"prompt": "x"}).head.key == good({"prompt": "x"}).head.key
    other = RowParser(FLAGS, hash_key=b"another model").parse(Record(3, "", json.dumps({"prompt": "x"}).encode()))
    assert other.head.key not in keys


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    assert good({"messages": [{"role": "user", "content": parts}]}).messages == [
        {"role": "user", "content": "What is 2 + 3?"}
    ]


@pytest.mark.parametrize(
    ("line", "type", "says"),
    [
        (b"nonsense", "invalid_json", "position 1"),
        (b'{"prompt": "x"', "invalid_json", "position"),
        (b'{"prompt": "\xff"}', "invalid_json", "0xff at position 13"),
        (b'{"prompt": "x", "prompt": "y"}', "invalid_json", "'prompt' is given twice"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_parameter", "must be a number"),
        (b'{"prompt": "x", "temperature": -Infinity}', "invalid_parameter", "from 0 to 100"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "invalid_json", "digits"),
        (b"[" * 200_000, "invalid_json", "nested"),
        (b'{"prompt": "x", "deep": ' + b"[" * 500 + b"]" * 500 + b"}", "invalid_json", "nested"),
        (b'{"prompt": "\\ud83d"}', "invalid_prompt", "surrogate"),
        (b"[1, 2]", "invalid_row", "not a list"),
        (b"null", "invalid_row", "not null"),
        ({}, "invalid_row", "exactly one of prompt, messages, prompt_token_ids"),
        ({"prompt": None}, "invalid_row", "no prompt"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "invalid_row", "prompt and prompt_token_ids"),
        ({"prompt": ["x"]}, "invalid_row", "must be a string"),
        ({"prompt": "x", "id": True}, "invalid_row", "id must be"),
        ({"prompt": "x", "id": [1]}, "invalid_row", "id must be"),
        (b'{"prompt": "x", "id": 1e999}', "invalid_row", "finite"),
        ({"prompt": "x", "temprature": 1}, "invalid_row", "did you mean 'temperature'?"),
        ({"prompt": "x", "n": 0}, "invalid_parameter", "from 1 to 128"),
        ({"prompt": "x", "n": True}, "invalid_parameter", "from 1 to 128"),
        ({"prompt": "x", "promt": "y"}, "invalid_row", "did you mean 'prompt'?"),
        ({"prompt": "x", "stream": True}, "invalid_row", "not supported"),
        ({"messages": []}, "invalid_messages", "messages"),
        ({"messages": ["x"]}, "invalid_messages", "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_messages", "'robot'"),
        ({"messages": [{"role": "user"}]}, "invalid_messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_messages", "only text"),
        ({"prompt_token_ids": []}, "invalid_row", "at least one"),
        ({"prompt_token_ids": [1.0]}, "invalid_row", "prompt_token_ids[0]"),
        ({"prompt_token_ids": [1, True]}, "invalid_row", "prompt_token_ids[1]"),
        ({"prompt_token_ids": [-1]}, "invalid_token_id", "prompt_token_ids[0] is -1"),
        ({"prompt_token_ids": [10**40]}, "invalid_token_id", "vocabulary"),
        ({"prompt": "x", "max_tokens": -1}, "invalid_parameter", "max_tokens is -1; it must be from 1 to"),
        ({"prompt": "x", "top_p": "0.5"}, "invalid_parameter", "top_p"),
        ({"prompt": "x", "max_tokens": 1, "max_completion_tokens": 1}, "invalid_parameter", "not both"),
    ],
)
def test_a_refused_line_says_why(line: Any, type: str, says: str) -> None:
    row = refused(line)
    assert row.error.type == type
    assert says in row.error.message


def test_a_refused_row_keeps_its_id() -> None:
    assert refused({"prompt": "x", "id": "a-7", "max_tokens": -1}).head.id == "a-7"
    assert refused(b"nonsense").head.id == 3


def test_long_values_do_not_make_long_errors() -> None:
    assert len(refused({"prompt": "x", "temperature": "9" * 10**6}).error.message) < MAX_MESSAGE_CHARS + 10


def test_the_answer_line() -> None:
    result = Result("h\u00e9\u2028\x85\n", [5, 6], "stop", Usage(4, 2, 1))
    head = Head(3, 255, "a", columns={"label": "\ud83d", "score": float("-inf"), "text": "its own"})
    line = format_line(head, [result])
    assert (line.index, line.key, line.failed) == (3, 255, False)
    assert len(line.data.decode().splitlines()) == 1
    assert list(json.loads(line.data).items()) == [
        ("id", "a"),
        ("index", 3),
        ("text", "h\u00e9\u2028\x85\n"),
        ("finish_reason", "stop"),
        ("usage", {"prompt_tokens": 4, "completion_tokens": 2, "cached_tokens": 1}),
        ("error", None),
        ("key", "00000000000000ff"),
        ("label", "\ud83d"),
        ("score", float("-inf")),
        ("input_text", "its own"),
    ]
    assert json.loads(format_line(head, [result], return_token_ids=True).data)["token_ids"] == [5, 6]
    assert parse_line(line.data) == line


def test_the_line_of_several_samples() -> None:
    results = [Result(text, [5] * count, "stop", Usage(4, count, 1)) for count, text in ((1, "a"), (2, "b"))]
    row = json.loads(format_line(Head(3, 1, 3), results).data)
    assert row["text"] == "a"
    assert row["samples"] == [{"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": "stop"}]
    assert row["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 1}


def test_the_error_line() -> None:
    line = format_line(Head(3, 1, 3), row_error("invalid_row", "why"), return_token_ids=True)
    assert line.failed and parse_line(line.data) == line
    row = json.loads(line.data)
    assert row["finish_reason"] == "error"
    assert row["error"] == {"type": "invalid_row", "message": "why"}
    assert (row["text"], row["token_ids"]) == ("", [])
    assert row["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}


def check_line(line: bytes) -> None:
    row = parse(line)
    out = format_line(row.head, row.error if isinstance(row, BadRow) else row_error("invalid_row", ""))
    assert out.data.endswith(b"\n") and len(out.data.decode("utf-8").splitlines()) == 1
    assert parse_line(out.data) == out
    assert out == Line(3, row.head.key, True, out.data)
    if isinstance(row, Row):
        assert sum(source is not None for source in (row.prompt, row.messages, row.prompt_token_ids)) == 1
        (row.prompt or "").encode()


@settings(deadline=None)
@given(st.binary())
def test_any_bytes(line: bytes) -> None:
    check_line(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("user"),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(), json_values), st.booleans())
def test_any_json_object(value: dict[str, Any], ascii: bool) -> None:
    check_line(json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(st.text(st.characters(categories=["Cs", "Lu"]), min_size=1, max_size=4))
def test_lone_surrogates_survive_in_ids_and_messages(text: str) -> None:
    check_line(json.dumps({"id": text, "prompt": text, text: text}).encode())
    check_line(json.dumps({"id": text, "messages": [{"role": text, "content": text}]}).encode())
