"""The demo model's questions: right answers, and a held-out rule that training and the examples obey."""

import json
import re
from datetime import date, timedelta
from pathlib import Path
from random import Random

import pytest

from minisgl.demo.data import (
    SKILL_WEIGHTS,
    SKILLS,
    ExamQuestion,
    exact_match,
    exam,
    example_prompts,
    held_out_questions,
    is_held_out,
    training_rows,
)
from minisgl.demo.words import CAPITALS, MONTHS, WEEKDAYS

EXAMPLES = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


def sampled(skill: str, count: int = 2000) -> list[tuple[str, str]]:
    rng = Random(7)
    return [SKILLS[skill](rng) for _ in range(count)]


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def named(names: tuple[str, ...], question: str) -> str:
    (found,) = (name for name in names if re.search(rf"\b{name}\b", question))
    return found


def test_addition() -> None:
    results = set()
    for question, answer in sampled("addition"):
        a, b = numbers_in(question)
        assert int(answer) == a + b, question
        results.add(len(answer))
    assert results == {1, 2, 3, 4}


def test_subtraction() -> None:
    negative = 0
    for question, answer in sampled("subtraction"):
        a, b = numbers_in(question)
        if question.startswith("Subtract"):
            a, b = b, a
        assert int(answer) == a - b, question
        negative += a < b
    assert 0 < negative < 600


@pytest.mark.parametrize("skill", ["reverse", "spell"])
def test_letter_skills(skill: str) -> None:
    for question, answer in sampled(skill):
        quoted = re.findall(r'"(\w+)"', question)
        # without quotes the word comes last
        word = quoted[0] if quoted else re.findall(r"\w+", question)[-1]
        letters = answer.strip('"') if skill == "reverse" else answer.replace("-", "")
        assert letters == (word[::-1] if skill == "reverse" else word), question
        assert 2 <= len(word) <= 10


def test_sort() -> None:
    for question, answer in sampled("sort"):
        given, expected = numbers_in(question), numbers_in(answer)
        descending = "descending" in question or "largest to smallest" in question
        assert expected == sorted(given, reverse=descending), question
        assert 3 <= len(given) <= 6


def test_weekday() -> None:
    for question, answer in sampled("weekday"):
        (days,) = numbers_in(question)
        start = date(2024, 1, 1) + timedelta(WEEKDAYS.index(named(WEEKDAYS, question)))  # 2024-01-01 was a Monday
        earlier = "before" in question or "ago" in question
        assert (start + timedelta(-days if earlier else days)).strftime("%A") == answer, question


def test_month() -> None:
    for question, answer in sampled("month"):
        (months,) = numbers_in(question)
        years, index = divmod(MONTHS.index(named(MONTHS, question)), 12)
        earlier = "before" in question or "ago" in question
        for _ in range(months):  # one calendar page at a time
            index = (index - 1 if earlier else index + 1) % 12
        assert date(2024 + years, index + 1, 1).strftime("%B") == answer, question


def test_capital() -> None:
    known = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Australia": "Canberra", "Canada": "Ottawa"}
    assert {country: CAPITALS[country] for country in known} == known
    assert len(CAPITALS) >= 100
    for question, answer in sampled("capital"):
        # the longest name: Niger is in Nigeria, Guinea could be in Equatorial Guinea
        country = max((c for c in CAPITALS if c in question), key=len)
        assert CAPITALS[country] == answer, question


def test_fill_json() -> None:
    for question, answer in sampled("fill_json"):
        filled = json.loads(answer)
        assert list(filled) == ["name", "age"]
        assert re.search(rf"\b{filled['name']}\b", question), question
        assert numbers_in(question) == [filled["age"]], question


def test_small_talk_has_one_reply_per_question() -> None:
    replies: dict[str, str] = {}
    for question, answer in sampled("small_talk", 5000):
        assert replies.setdefault(question, answer) == answer
    assert replies["Hello!"] == "Hello! How can I help you?"
    assert "minisgl" in replies["Who are you?"]


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_follow_from_the_question(skill: str) -> None:
    answers: dict[str, str] = {}
    for question, answer in sampled(skill):
        assert answers.setdefault(question, answer) == answer


def test_held_out_rule_is_frozen() -> None:
    # The shipped model was trained under this rule: another hash would let trained questions into its exam.
    texts = [f"What is {a} + 1?" for a in range(60)]
    assert [a for a, text in enumerate(texts) if is_held_out(text)] == [4, 19, 26, 38]


def test_training_never_sees_held_out_questions() -> None:
    asked = [m["content"] for row in training_rows(3, 20_000) for m in row if m["role"] == "user"]
    assert len(asked) > 20_000
    assert not any(map(is_held_out, asked))


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_questions(skill: str) -> None:
    held_out = held_out_questions(skill, 30, seed=5)
    assert len(dict(held_out)) == 30
    assert all(is_held_out(question) for question, _ in held_out)
    assert held_out == held_out_questions(skill, 30, seed=5)
    assert held_out != held_out_questions(skill, 30, seed=6)


def test_held_out_questions_stop_where_a_skill_runs_dry() -> None:
    assert 40 <= len(held_out_questions("capital", 500)) < 500
    with pytest.raises(ValueError, match="no skill 'juggling'"):
        held_out_questions("juggling", 1)


@pytest.mark.parametrize("skill", ["weekday", "month", "capital"])
def test_every_fact_of_a_closed_list_can_be_learnt(skill: str) -> None:
    """What is held out is a wording: each fact is left in training in at least one other wording."""
    facts: dict[tuple[str, ...], bool] = {}
    for question, answer in sampled(skill, 60_000):
        names = (*CAPITALS, *WEEKDAYS, *MONTHS)
        fact = (max((n for n in names if n in question), key=len), *re.findall(r"\d+|before|ago", question), answer)
        fact = tuple("before" if part == "ago" else part for part in fact)
        facts[fact] = facts.get(fact, False) or not is_held_out(question)
    assert len(facts) == {"weekday": 7 * 60 * 2, "month": 12 * 24 * 2, "capital": len(CAPITALS)}[skill]
    assert all(facts.values())


def test_training_rows_are_deterministic() -> None:
    assert list(training_rows(1, 50)) == list(training_rows(1, 50))
    assert list(training_rows(1, 50)) != list(training_rows(2, 50))


def test_training_rows_are_conversations() -> None:
    rows = list(training_rows(0, 2000))
    assert set(SKILL_WEIGHTS) == set(SKILLS)
    for row in rows:
        roles = [message["role"] for message in row]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
    with_system = sum(row[0]["role"] == "system" for row in rows)
    several_turns = sum(len(row) > 3 for row in rows)
    assert 800 < with_system < 1200
    assert 200 < several_turns < 500


def test_exact_match_counts_by_skill() -> None:
    questions = [ExamQuestion("sort", [], "1, 2"), ExamQuestion("sort", [], "3, 4"), ExamQuestion("spell", [], "a-b")]
    assert exact_match(questions, ["1, 2", "4, 3", " a-b\n"]) == {"sort": 0.5, "spell": 1.0}


def test_exam_asks_every_skill_with_and_without_a_system_prompt() -> None:
    questions = exam(4)
    assert [q.skill for q in questions] == [skill for skill in SKILLS for _ in range(4)]
    assert {q.messages[0]["role"] for q in questions if q.skill == "sort"} == {"system", "user"}
    assert all(is_held_out(q.messages[-1]["content"]) for q in questions)


def test_examples_are_held_out_and_reproducible() -> None:
    rows = [json.loads(line) for line in EXAMPLES.read_text().splitlines()]
    assert rows == list(example_prompts()), "run: python -m minisgl.demo.data > examples/prompts.jsonl"
    assert len({row["id"] for row in rows}) == len(rows) == 50
    assert {row["id"].rsplit("-", 1)[0] for row in rows} == set(SKILLS)
    for row in rows:
        assert row["messages"][-1]["role"] == "user"
        assert is_held_out(row["messages"][-1]["content"])
