"""The paired test of two results."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minisgl.errors import MinisglError
from minisgl.evaluate.compare import compare, mcnemar


def save(path: Path, scores: list[Any], metric: str = "accuracy", **values: Any) -> Path:
    path.mkdir()
    with (path / "samples.jsonl").open("w") as file:
        for index, score in enumerate(scores):
            sample = {"id": f"r{index}", "index": index, "answer": index, "target": 1, "scores": {metric: score}}
            file.write(json.dumps({**sample, "verdict": "right" if score == 1 else "wrong", **values}) + "\n")
    return path


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 2) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)  # 0.109
    assert mcnemar(2000, 1000) < 1e-70


def test_verdicts_and_flips(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [1.0] * 4 + [0.0] * 6)
    b = save(tmp_path / "b", [0.0] + [1.0] * 8 + [0.0, 1.0])
    report = compare(a, b)
    [one] = report.metrics
    assert (one.a, one.b, one.difference) == (0.4, 0.8, pytest.approx(0.4))
    assert (one.better, one.worse, one.test, one.n) == (5, 1, "McNemar exact", 10)
    assert one.p == pytest.approx(2 * 7 / 64)
    assert one.low < 0.4 < one.high
    assert [flip.id for flip in report.lost] == ["r0"]
    assert [flip.id for flip in report.gained] == ["r4", "r5", "r6", "r7", "r8"]
    assert (report.only_a, report.only_b) == (0, 1)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["metrics"][0]["p"] == one.p


def test_perplexity_is_compared_by_bootstrap(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [[2.0 + place / 100, 1.0] for place in range(50)], "token_perplexity")
    b = save(tmp_path / "b", [[1.9 + place / 100, 1.0] for place in range(50)], "token_perplexity")
    [one] = compare(a, b / "samples.jsonl").metrics
    assert (one.test, one.p, one.worse) == ("paired bootstrap", 0.0, 50)  # lower on every row
    assert one.low <= one.difference <= one.high < 0
    [same] = compare(a, a).metrics
    assert (same.p, same.difference) == (1.0, 0.0)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [1.0])
    with pytest.raises(MinisglError, match="does not exist; name the folder of a `minisgl eval`"):
        compare(a, tmp_path)
    with pytest.raises(MinisglError, match="row 0 of .* are two questions"):
        compare(a, save(tmp_path / "b", [1.0], target=2))
    with pytest.raises(MinisglError, match="no metric in common"):
        compare(a, save(tmp_path / "c", [1.0], "other"))
    with pytest.raises(MinisglError, match="no row in common"):
        compare(a, save(tmp_path / "d", []))
    (tmp_path / "bad.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(MinisglError, match="no sample of `minisgl eval`"):
        compare(a, tmp_path / "bad.jsonl")
