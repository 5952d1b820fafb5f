"""Two evaluations of the same questions: is one better, by how much, and on which rows do they differ.

    scores of 0 and 1     McNemar's exact test: of the rows where the two differ, each side is as likely (McNemar, 1947)
    any other             paired bootstrap: the share of resamples in which the difference has the other sign, twice
    interval              95%, of the difference B - A, by paired bootstrap

Knows samples. Does not know tasks or models.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.batch_run.files import replaced
from minisgl.errors import MinisglError
from minisgl.evaluate.metrics import Floats, bootstrap, combine
from minisgl.evaluate.results import SAMPLES

SAME = ("target", "options")  # of a row, what must be equal in both


@dataclass(frozen=True)
class Flip:
    """A row that one got right and the other did not."""

    index: int
    id: Any
    answer_a: Any
    answer_b: Any
    target: Any


@dataclass(frozen=True)
class Comparison:
    """One metric. n: rows in both. p: chance of a difference as large if there were none, by `test`."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    test: str
    n: int
    better: int
    worse: int


@dataclass
class Report:
    """only_a, only_b: rows with a score in one of the two only. gained: flips to right in B; lost: to wrong."""

    metrics: list[Comparison] = field(default_factory=list)
    gained: list[Flip] = field(default_factory=list)
    lost: list[Flip] = field(default_factory=list)
    only_a: int = 0
    only_b: int = 0

    def save(self, path: Path) -> None:
        with replaced(path) as file:
            file.write(json.dumps(asdict(self), indent=2).encode() + b"\n")


def compare(a: Path, b: Path) -> Report:
    """Compare two folders of results, or samples files. MinisglError when they are not of the same questions."""
    first, second = _load(a), _load(b)
    shared = [index for index in first if index in second]
    if not shared:
        raise MinisglError(f"{a} and {b} have no row in common")
    for index in shared:
        if any(first[index].get(key) != second[index].get(key) for key in SAME):
            raise MinisglError(f"row {index} of {a} and of {b} are two questions: compare results of the same data")
    report = Report(only_a=len(first) - len(shared), only_b=len(second) - len(shared))
    names = dict.fromkeys(name for index in shared for name in first[index]["scores"])
    for name in names:
        pairs = [(first[index]["scores"], second[index]["scores"]) for index in shared]
        both = [(_pair(one[name]), _pair(other[name])) for one, other in pairs if name in one and name in other]
        if both:
            report.metrics.append(_compare(name, np.array(both)))
    if not report.metrics:
        raise MinisglError(f"{a} and {b} have no metric in common")
    for index in shared:
        before, after = first[index], second[index]
        if (before["verdict"] == "right") != (after["verdict"] == "right"):
            flip = Flip(index, before["id"], before["answer"], after["answer"], before["target"])
            (report.gained if after["verdict"] == "right" else report.lost).append(flip)
    return report


def mcnemar(better: int, worse: int) -> float:
    """The two-sided exact p-value: a fair coin that falls so unevenly."""
    flips = better + worse
    tail = sum(math.comb(flips, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def _compare(metric: str, pairs: Floats) -> Comparison:
    """pairs  # [rows, 2 (A, B), 2 (sum, weight)]"""

    def difference(rows: Any) -> float:
        a, b = (combine(metric, pairs[rows, side, 0], pairs[rows, side, 1]) for side in (0, 1))
        return b - a

    a, b = (combine(metric, pairs[:, side, 0], pairs[:, side, 1]) for side in (0, 1))
    drawn = bootstrap(len(pairs), difference)
    low, high = np.quantile(drawn, (0.025, 0.975))
    means = pairs[:, :, 0] / pairs[:, :, 1]
    better, worse = int((means[:, 1] > means[:, 0]).sum()), int((means[:, 1] < means[:, 0]).sum())
    if np.isin(pairs[:, :, 0], (0.0, 1.0)).all() and (pairs[:, :, 1] == 1).all():
        p, test = mcnemar(better, worse), "McNemar exact"
    else:
        p, test = min(1.0, 2 * float(min((drawn <= 0).mean(), (drawn >= 0).mean()))), "paired bootstrap"
    return Comparison(metric, a, b, b - a, float(low), float(high), p, test, len(pairs), better, worse)


def _pair(score: Any) -> list[float]:
    return score if isinstance(score, list) else [score, 1.0]


def _load(path: Path) -> dict[int, dict[str, Any]]:
    """The samples by row index."""
    file = path / SAMPLES if path.is_dir() else path
    try:
        return {sample["index"]: sample for sample in _samples(file)}
    except FileNotFoundError:
        raise MinisglError(f"{file} does not exist; name the folder of a `minisgl eval`, or its {SAMPLES}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MinisglError(f"{file} has a line that is no sample of `minisgl eval`") from error


def _samples(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for line in lines:
            sample = json.loads(line)
            if not {"index", "verdict", "scores"} <= set(sample):
                raise KeyError("scores")
            yield sample
