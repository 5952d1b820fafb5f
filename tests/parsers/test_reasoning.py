import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.errors import MinisglError
from minisgl.parsers import ReasoningParser, find_style

QWEN3_OPEN = "<|im_start|>assistant\n<think>\n"
QWEN3_CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN = "<|im_start|>assistant\n"

# Text in which tags, parts of tags and line breaks are frequent.
texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "<thin", "\n", " ", "a", "日", "x y"]), max_size=12
).map("".join)


def pieces(text, cuts):
    """`text` cut at these places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


def parse(style, prompt, parts):
    parser = ReasoningParser(style, prompt)
    deltas = [*map(parser.push, parts), parser.finish()]
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)


def expected(style, prompt, text):
    """The same by expressions over the whole text."""
    if style == "none" or prompt == QWEN3_CLOSED:
        return "", text
    thinks = style == "deepseek-r1" or prompt == QWEN3_OPEN
    match = re.fullmatch(r"\s*<think>(.*)" + ("|(.*)" if thinks else ""), text, re.DOTALL)
    if match is None:
        return "", text
    inner = match[1] if match[1] is not None else match[2]
    reasoning, end, content = inner.partition("</think>")
    reasoning = reasoning.lstrip("\n")
    return (reasoning.rstrip("\n"), content.lstrip("\n")) if end else (reasoning, "")


@settings(max_examples=500, deadline=None)
@given(
    style=st.sampled_from(["none", "qwen3", "deepseek-r1"]),
    prompt=st.sampled_from([PLAIN, QWEN3_OPEN, QWEN3_CLOSED]),
    text=texts,
    cuts=st.lists(st.integers(0, 100), max_size=10),
)
def test_any_pieces_of_any_text(style, prompt, text, cuts):
    assert parse(style, prompt, pieces(text, cuts)) == expected(style, prompt, text)
    assert parse(style, prompt, list(text)) == expected(style, prompt, text)


@pytest.mark.parametrize(
    "prompt, text, reasoning, content",
    [
        (PLAIN, "<think>\nOne.\n\nTwo.\n</think>\n\nThree.\n", "One.\n\nTwo.", "Three.\n"),  # Qwen3
        (QWEN3_OPEN, "One.\n</think>\n\nTwo.", "One.", "Two."),  # Qwen3-Thinking, DeepSeek-R1
        (QWEN3_OPEN, "<think>\nOne.</think>Two.", "One.", "Two."),  # the tag once more
        (QWEN3_CLOSED, "Two.", "", "Two."),  # enable_thinking=False
        (QWEN3_CLOSED, "<think>is a tag", "", "<think>is a tag"),
        (PLAIN, "\n\nNo tag.", "", "\n\nNo tag."),
        (PLAIN, "See <think>.", "", "See <think>."),
        (QWEN3_OPEN, "cut by max_tokens </thi", "cut by max_tokens </thi", ""),
        (PLAIN, "<thi", "", "<thi"),
        (QWEN3_OPEN, "a</think>b</think>c<think>d", "a", "b</think>c<think>d"),
    ],
)
def test_answers(prompt, text, reasoning, content):
    assert parse("qwen3", prompt, [text]) == (reasoning, content)


def test_text_streams_as_soon_as_it_is_certain():
    parser = ReasoningParser("qwen3")
    assert parser.push("<think>") == ("", "")
    assert parser.push("\nOne") == ("One", "")
    assert parser.push(" <b") == (" <b", "")  # no beginning of the tag
    assert parser.push("\n</") == ("", "")
    assert parser.push("x") == ("\n</x", "")
    assert parser.push("</think>\n") == ("", "")
    assert parser.push("\nTwo\n") == ("", "Two\n")
    assert parser.finish() == ("", "")


def test_an_answer_may_go_on_inside_of_thinking():
    prefill = "<think>\nLet me"
    parser = ReasoningParser("qwen3", PLAIN + prefill)
    parser.push(prefill)
    assert parser.push(" see.</think>Yes.") == (" see.", "Yes.")


def test_styles():
    assert find_style("auto", "{% if enable_thinking %}<think>{% endif %}") == "qwen3"
    assert find_style("auto", "{{ content.split('</think>')[-1] }}") == "qwen3"
    assert find_style("auto", "{{ messages[0].content }}") == "none"
    assert find_style("deepseek-r1", "") == "deepseek-r1"
    with pytest.raises(MinisglError, match="'r1' is not known; choose one of: auto, none, qwen3, deepseek-r1"):
        find_style("r1", "")
