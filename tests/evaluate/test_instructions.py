from typing import Any

import pytest

from minisgl.evaluate.instructions import CHECKS, followed

# An instruction, its arguments, a text that follows it and one that does not.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, "a cat, a dog", "catalogue of dogs"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "catalogue", "A Cat"),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "at least"}, "So, so", "so"),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "the", "Eel"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two!"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "One\n\nTwo, then",
        "Two\n\nOne",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np.s. more", "Bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "a *b c* d", "a * b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nSECTION 2",
        "1",
    ),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "One\n******\nTwo", "One\n******\nOne"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "Say it. Done", "Done. Say it"),
    ("startend:end_checker", {"end_phrase": "the end."}, "This is The end.", "The end. Or not"),
    ("startend:quotation", {}, '"All of it"', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "TWO WORDS here",
        "ONE word",
    ),
    ("change_case:english_capital", {}, "ALL OF IT 1", "All"),
    ("change_case:english_lowercase", {}, "all of it 1", "All"),
    ("punctuation:no_comma", {}, "no; none", "a, b"),
]


def test_every_check_is_tried_here() -> None:
    assert [name for name, *_ in CASES] == [*CHECKS]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[name for name, *_ in CASES])
def test_an_instruction(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    target = [[name], [{**arguments, "unused": None}]]
    assert followed(good, target) == [True]
    assert followed(bad, target) == [False]
    assert followed(" ", target) == [False]  # nothing follows no instruction


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([["punctuation:none"], [{}]], "cannot be checked"),
        ([["length_constraints:number_words"], [{"num_words": None}]], "arguments of length_constraints:number_words"),
        ([["punctuation:no_comma"], []], "pair of lists"),
        ("punctuation:no_comma", "pair of lists"),
    ],
)
def test_a_target_that_cannot_be_checked(target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        followed("text", target)
