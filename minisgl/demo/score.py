"""Score the demo model through the engine: `python -m minisgl.demo.score`.

The questions are the ones that training held out, so the engine can be compared with `model/scores.json`, which plain
transformers generation measured on the same checkpoint.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from minisgl.demo import MODEL_PATH
from minisgl.demo.data import exact_match, exam

if TYPE_CHECKING:
    from minisgl import LLM

MAX_ANSWER_TOKENS = 64


def score(llm: LLM, count_per_skill: int) -> dict[str, float]:
    """Exact match of greedy answers, by skill, 0 to 1, on up to `count_per_skill` held-out questions of each."""
    from minisgl import SamplingParams

    questions = exam(count_per_skill)
    results = llm.chat(
        [question.messages for question in questions], SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    )
    return exact_match(questions, [result.text for result in results])


@click.command()
@click.option("--count", default=100, show_default=True, help="Held-out questions of each skill, at most.")
@click.option("--device", help="Default: the engine's choice.")
@click.option("--model", default=str(MODEL_PATH), show_default=True, help="Checkpoint folder.")
def main(count: int, device: str | None, model: str) -> None:
    """Print the exact match of every skill."""
    from minisgl import LLM

    options = {"device": device} if device else {}
    with LLM(model, **options) as llm:
        scores = score(llm, count)
    num_questions = Counter(question.skill for question in exam(count))
    click.echo(f"{'skill':<12} {'questions':>9} {'exact match':>11}")
    for skill, share in scores.items():
        click.echo(f"{skill:<12} {num_questions[skill]:>9} {share:>11.1%}")


if __name__ == "__main__":
    main()
