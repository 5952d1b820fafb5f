"""Questions for the demo model: endless training rows, and held-out questions that no training row contains.

Whether a question is held out depends on its text alone, so training, scoring and the examples agree without a list.
A held-out question is new as a text; the fact behind it (the capital of France) is in the training rows in other words.

`python -m minisgl.demo.data > examples/prompts.jsonl` writes the example batch, from held-out questions only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from minisgl.demo.skills import SKILLS

Message = dict[str, str]  # {"role": ..., "content": ...}
Row = list[Message]

HELD_OUT_ONE_IN = 20

# Shares of the training questions: the algorithmic skills need many more examples than the closed lists.
SKILL_WEIGHTS = {
    "addition": 15, "subtraction": 17, "reverse": 16, "spell": 6, "sort": 15,
    "weekday": 9, "month": 8, "capital": 5, "fill_json": 6, "small_talk": 3,
}  # fmt: skip

USUAL_SYSTEM_PROMPT = "You are a helpful assistant."
SYSTEM_ROLES = ("helpful", "friendly", "concise", "careful", "polite")
SYSTEM_NOUNS = ("assistant", "chatbot", "AI assistant", "language model", "demo model")
SYSTEM_ENDINGS = ("", "", " Answer briefly.", " Keep your answers short.", " Be concise.", " Answer exactly.")


def is_held_out(question: str) -> bool:
    """True for about one question in 20, the same ones on every machine and Python version."""
    return zlib.crc32(question.encode()) % HELD_OUT_ONE_IN == 0


def training_rows(seed: int, count: int) -> Iterator[Row]:
    """`count` conversations of one to three turns, about half of them under a system prompt."""
    rng = Random(f"train {seed}")  # a str seed: different from every `Random(int)` and stable across processes
    for _ in range(count):
        row = [{"role": "system", "content": _system_prompt(rng)}] if rng.random() < 0.5 else []
        (turns,) = rng.choices((1, 2, 3), weights=(84, 12, 4))
        for _ in range(turns):
            question, answer = _training_question(rng)
            row += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield row


def held_out_questions(skill: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Up to `count` different held-out (question, answer) pairs; fewer where the skill has no more of them."""
    if skill not in SKILLS:
        raise ValueError(f"no skill {skill!r}; there are {', '.join(SKILLS)}")
    rng = Random(f"held out {skill} {seed}")
    found: dict[str, str] = {}
    for _ in range(1000 + 200 * count):  # the closed lists run dry before a large count is reached
        if len(found) >= count:
            break
        question, answer = SKILLS[skill](rng)
        if is_held_out(question):
            found[question] = answer
    return list(found.items())


class ExamQuestion(NamedTuple):
    skill: str
    messages: Row
    answer: str


def exam(count_per_skill: int) -> list[ExamQuestion]:
    """Held-out questions of every skill, every second one under a system prompt."""
    return [
        ExamQuestion(skill, _conversation(question, with_system=index % 2 == 1), answer)
        for skill in SKILLS
        for index, (question, answer) in enumerate(held_out_questions(skill, count_per_skill))
    ]


def exact_match(questions: list[ExamQuestion], answers: list[str]) -> dict[str, float]:
    """The share of answers of each skill that are right to the letter; `answers` is in the order of `questions`."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.skill, []).append(answer.strip() == question.answer)
    return {skill: sum(marks) / len(marks) for skill, marks in right.items()}


def example_prompts(per_skill: int = 5) -> Iterator[dict[str, object]]:
    """Rows for `minisgl run`: held-out questions of every skill, some of them under a system prompt."""
    for skill in SKILLS:
        for index, (question, _) in enumerate(held_out_questions(skill, per_skill, seed=1)):
            messages = _conversation(question, with_system=index == per_skill - 1)
            yield {"id": f"{skill}-{index + 1}", "messages": messages}


def _conversation(question: str, with_system: bool) -> Row:
    system = [{"role": "system", "content": USUAL_SYSTEM_PROMPT}] if with_system else []
    return [*system, {"role": "user", "content": question}]


def _training_question(rng: Random) -> tuple[str, str]:
    (skill,) = rng.choices(tuple(SKILL_WEIGHTS), weights=tuple(SKILL_WEIGHTS.values()))
    while True:
        question, answer = SKILLS[skill](rng)
        if not is_held_out(question):
            return question, answer


def _system_prompt(rng: Random) -> str:
    if rng.random() < 0.4:
        return USUAL_SYSTEM_PROMPT
    role, noun = rng.choice(SYSTEM_ROLES), rng.choice(SYSTEM_NOUNS)
    return f"You are a {role} {noun}.{rng.choice(SYSTEM_ENDINGS)}"


if __name__ == "__main__":
    for prompt in example_prompts():
        print(json.dumps(prompt))
