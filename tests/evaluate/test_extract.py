from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.errors import MinisglError
from minisgl.evaluate.extract import Extractor, is_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7.", "7"),
        ("#### 1,234", "1234"),
        ("it costs $1,234.50!", "1234.50"),
        ("x = -5", "-5"),
        ("10-3", "3"),  # a minus between numbers is no sign
        ("lists 1,2,3", "3"),
        ("12,3456", "3456"),
        ("about 1e-3", "1e-3"),
        (".5", ".5"),
        ("3.", "3"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, answer: str | None) -> None:
    assert Extractor("number")(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("I think A; the final answer is **D**", "D"),
        ("B", "B"),
        ("B. Unlike (A), it floats", "B"),
        ("(A) is wrong, so (C)", "C"),
        ("The answer is a cat", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(text: str, answer: str | None) -> None:
    assert Extractor("letter")(text) == answer


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("text", "  a b \n", "a b"),
        ("text", " \n", None),
        ("regex:x=(\\d+)", "x=1 and x=22", "22"),
        ("regex:\\d+", "1 and 22", "22"),
        ("regex:a(b)?", "a", None),
        ("json:name", 'Sure! {"name": "Ann", "age": 3}', "Ann"),
        ("json:a.b", '{"a": {"b": [1]}}', [1]),
        ("json:age", '{"name": {} {"age": 0}', 0),
        ("json:name", "{" * 3000, None),
        ("json:name", "no JSON", None),
        ("code", "Here:\n```python\nx = 1\n```\nDone", "x = 1"),
        ("code", "    return 1\n", "    return 1\n"),
        ("code", "```\nx = 1", "x = 1"),
        ("code", "\n", None),
    ],
)
def test_other_rules(rule: str, text: str, answer: Any) -> None:
    assert Extractor(rule)(text) == answer


@given(st.text())
def test_no_text_breaks_a_rule(text: str) -> None:
    for rule in ("text", "number", "letter", "code", "json:a.b", "regex:a(.)"):
        answer = Extractor(rule)(text)
        if rule == "number" and answer is not None:
            float(answer)


@pytest.mark.parametrize("rule", ["", "words", "number:3", "json", "regex:", "regex:("])
def test_a_rule_that_is_none(rule: str) -> None:
    with pytest.raises(MinisglError, match="extract"):
        Extractor(rule)


@pytest.mark.parametrize(
    ("answer", "target", "match", "right"),
    [
        ("Paris ", "Paris", "exact", True),
        ("paris", "Paris", "exact", False),
        ("The  Paris!", "paris", "normalised", True),
        ("in Paris, France", "paris", "contains", True),
        ("in Lyon", "paris", "contains", False),
        ("1000.0005", 1000, "number", True),  # 1e-6 of 1000 is 0.001
        ("1000.01", 1000, "number", False),
        ("0.0000005", "0", "number", True),
        ("1,000", "1000", "number", True),
        ("many", 3, "number", False),
        ("b", ["a", "b"], "exact", True),
        ([1, 2], "[1, 2]", "exact", True),
        (3, "3", "exact", True),
    ],
)
def test_when_an_answer_is_right(answer: Any, target: Any, match: str, right: bool) -> None:
    assert is_right(answer, target, match, 1e-6) is right


def test_a_target_that_is_no_number_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="'eight' is not a number"):
        is_right("8", ["8", "eight"], "number", 0)
