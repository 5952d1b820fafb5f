"""Scoring through the engine's interface, with a stand-in engine, and the shipped checkpoint's own record."""

import json
from types import SimpleNamespace

from minisgl import SamplingParams
from minisgl.demo import MODEL_PATH
from minisgl.demo.data import SKILLS, Row, exam
from minisgl.demo.score import score


class KnowsEverythingButSorting:
    """Answers like LLM.chat: results with `.text`, in the order of the conversations."""

    def chat(self, conversations: list[Row], params: SamplingParams) -> list[SimpleNamespace]:
        assert params.temperature == 0
        answers = {q.messages[-1]["content"]: "?" if q.skill == "sort" else q.answer for q in exam(3)}
        return [SimpleNamespace(text=answers[messages[-1]["content"]]) for messages in conversations]


def test_score_asks_the_exam_and_counts_exact_matches() -> None:
    scores = score(KnowsEverythingButSorting(), count_per_skill=3)  # type: ignore[arg-type]
    assert scores == {**dict.fromkeys(SKILLS, 1.0), "sort": 0.0}


def test_shipped_model_is_small_and_knows_its_skills() -> None:
    assert (MODEL_PATH / "model.safetensors").stat().st_size <= 12_000_000
    report = json.loads((MODEL_PATH / "scores.json").read_text())
    for scores in report["exact_match"].values():
        assert set(scores) == set(SKILLS)
        assert min(scores.values()) >= 0.95, scores
    assert min(report["questions"].values()) >= 30
