"""Verdicts become numbers: values with standard errors, and the rates that say how far to trust them.

    mean of 0 and 1        binomial error, sqrt(p (1 - p) / n)
    any other              bootstrap: the spread of the value over resampled rows (Efron, 1979)

Knows samples. Does not know tasks, files or how a verdict came about.
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
BOOTSTRAP_SEED = 0


class Value(NamedTuple):
    """One metric: its value and standard error (None where there is none), and the number of rows it is made of."""

    metric: str
    value: float | None
    stderr: float | None
    stderr_by: str
    n: int


@dataclass
class Tally:
    """What samples add up to. outputs: texts, of which some had no answer or were cut at max_tokens."""

    rows: int = 0
    errors: int = 0
    first_error: str | None = None
    not_run: int = 0
    outputs: int = 0
    no_answer: int = 0
    truncated: int = 0
    scores: dict[str, tuple["array[float]", "array[float]"]] = field(default_factory=dict)

    def add(self, sample: dict[str, Any]) -> None:
        self.rows += 1
        if sample["verdict"] == "error":
            self.errors += 1
            self.first_error = self.first_error or f"row {sample['id']}: {sample['error']['message']}"
        for output in sample.get("samples") or [sample]:
            if output["verdict"] != "error":
                self.outputs += 1
                self.not_run += output["verdict"] == "not run"
                self.no_answer += output["verdict"] == "no answer"
                self.truncated += output["finish_reason"] == "length"
        for name, score in sample["scores"].items():
            total, weight = score if isinstance(score, list) else (score, 1.0)
            sums, weights = self.scores.setdefault(name, (array("d"), array("d")))
            sums.append(total)
            weights.append(weight)

    def value(self, metric: str) -> Value:
        """One of the metrics; without a value where no row has a score."""
        if metric not in self.scores:
            return Value(metric, None, None, "none", 0)
        sums, weights = (np.asarray(part) for part in self.scores[metric])
        value = combine(metric, sums, weights)
        if np.isin(sums, (0.0, 1.0)).all() and (weights == 1).all():
            return Value(metric, value, math.sqrt(value * (1 - value) / len(sums)), "binomial", len(sums))
        if len(sums) == 1:
            return Value(metric, value, None, "none", 1)  # one row says nothing about the spread of rows
        spread = np.std(bootstrap(len(sums), lambda rows: combine(metric, sums[rows], weights[rows])), ddof=1)
        return Value(metric, value, float(spread), "bootstrap", len(sums))

    def rates(self) -> dict[str, float]:
        """Of the outputs, the shares without an answer and cut off."""
        return {
            "extraction_failure_rate": self.no_answer / max(1, self.outputs),
            "truncation_rate": self.truncated / max(1, self.outputs),
        }


def combine(metric: str, sums: Floats, weights: Floats) -> float:
    """The value of all rows: the weighted mean; of nats, the perplexity."""
    mean = float(sums.sum() / weights.sum())
    return math.exp(min(mean, 700.0)) if metric.endswith("perplexity") else mean


def bootstrap(n: int, value: Any) -> Floats:
    """`value(rows)` for RESAMPLES draws of n rows with replacement, the same draws every time.  # [RESAMPLES]"""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return np.array([value(rng.integers(n, size=n)) for _ in range(RESAMPLES)])


def tally(samples: Iterable[dict[str, Any]]) -> dict[str, Tally]:
    """The tally of all samples under "", and of each group under its name."""
    tallies = {"": Tally()}
    for sample in samples:
        tallies[""].add(sample)
        if "group" in sample:
            tallies.setdefault(sample["group"], Tally()).add(sample)
    return tallies
