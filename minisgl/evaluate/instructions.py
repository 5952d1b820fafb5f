"""Instructions that a program can check, by the names of IFEval (Zhou et al., 2023, arXiv 2311.07911, table 1).

Knows texts. Where IFEval asks a language detector or a sentence tokenizer, this looks at letters and full stops, so
scores are near to its own, not equal. `language:response_language` cannot be checked without one and is refused.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]


def followed(text: str, target: Any) -> list[bool]:
    """For each instruction whether the text follows it. `target`: [names, arguments of each]; ValueError where one is
    not known."""
    try:
        names, arguments = target
        pairs = list(zip(names, arguments, strict=True))
    except (TypeError, ValueError):
        raise ValueError("the target must be a pair of lists: instructions, and the arguments of each") from None
    return [_check(text, name, given or {}) for name, given in pairs]


def _check(text: str, name: str, arguments: Arguments) -> bool:
    if name not in CHECKS:
        raise ValueError(f"the instruction {name!r} cannot be checked")
    if not text.strip():
        return False
    try:
        return bool(CHECKS[name](text, arguments))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the arguments of {name} are not as they should be: {error!r}") from error


def _compare(count: int, arguments: Arguments, value: str, relation: str = "relation") -> bool:
    is_less = count < int(arguments[value])
    return is_less if arguments[relation] == "less than" else not is_less


def _count(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _has_word(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()])


def _parts(pattern: str, text: str) -> list[str]:
    return [part.strip() for part in re.split(pattern, text) if part.strip()]


def _first_word_of_paragraph(text: str, arguments: Arguments) -> bool:
    paragraphs = _parts(r"\n\n", text)
    if len(paragraphs) != arguments["num_paragraphs"] or arguments["nth_paragraph"] > len(paragraphs):
        return False
    first = paragraphs[arguments["nth_paragraph"] - 1].split()[0]
    return re.sub(r"\W", "", first).lower() == str(arguments["first_word"]).lower()


def _is_json(text: str) -> bool:
    try:
        json.loads(re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError:
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    parts = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(parts) == 2 and parts[0] != parts[1]


def _sections(text: str, arguments: Arguments) -> bool:
    found = re.findall(rf"{re.escape(arguments['section_spliter'])}\s?\d+", text)
    return len(found) >= int(arguments["num_sections"])


CHECKS: dict[str, Callable[[str, Arguments], Any]] = {
    "keywords:existence": lambda text, a: all(_has_word(word, text) for word in a["keywords"]),
    "keywords:forbidden_words": lambda text, a: not any(_has_word(word, text) for word in a["forbidden_words"]),
    "keywords:frequency": lambda text, a: _compare(_count(a["keyword"], text), a, "frequency"),
    "keywords:letter_frequency": lambda text, a: _compare(
        text.lower().count(a["letter"].lower()), a, "let_frequency", "let_relation"
    ),
    "length_constraints:number_words": lambda text, a: _compare(len(re.findall(r"\w+", text)), a, "num_words"),
    "length_constraints:number_sentences": lambda text, a: _compare(_sentences(text), a, "num_sentences"),
    "length_constraints:number_paragraphs": lambda text, a: len(_parts(r"\*\*\*", text)) == a["num_paragraphs"],
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"]
    ),
    "detectable_content:postscript": lambda text, a: a["postscript_marker"].lower() in text.lower(),
    "detectable_format:number_bullet_lists": lambda text, a: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)", text, re.MULTILINE)) == a["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": lambda text, a: (
        len(re.findall(r"\*[^*\n]*[^*\s][^*\n]*\*", text)) >= a["num_highlights"]
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:constrained_response": lambda text, a: any(
        f"My answer is {answer}." in text for answer in ("yes", "no", "maybe")
    ),
    "detectable_format:json_format": lambda text, a: _is_json(text),
    "detectable_format:title": lambda text, a: re.search(r"<<[^\n]*[^\s<>][^\n]*>>", text),
    "combination:two_responses": lambda text, a: _two_responses(text),
    "combination:repeat_prompt": lambda text, a: text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda text, a: text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    "startend:quotation": lambda text, a: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, a: _compare(
        sum(word.isupper() for word in re.findall(r"\w+", text)), a, "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda text, a: text.isupper(),
    "change_case:english_lowercase": lambda text, a: text.islower(),
    "punctuation:no_comma": lambda text, a: "," not in text,
}
