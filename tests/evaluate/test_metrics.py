"""Values and their standard errors."""

import math
from typing import Any

import numpy as np
import pytest

from minisgl.evaluate.metrics import Tally, tally


def sample(verdict: str = "right", scores: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    error = {"message": "it is so"} if verdict == "error" else None
    return {"id": "a", "verdict": verdict, "scores": scores or {}, "finish_reason": "stop", "error": error, **values}


def filled(*scores: Any) -> Tally:
    return tally([sample(scores={"m_perplexity" if isinstance(one, list) else "m": one}) for one in scores])[""]


def test_the_error_of_zeros_and_ones_is_binomial() -> None:
    value = filled(1.0, 0.0, 0.0, 0.0).value("m")
    assert value == ("m", 0.25, math.sqrt(0.25 * 0.75 / 4), "binomial", 4)


def test_any_other_error_is_by_bootstrap() -> None:
    scores = np.random.default_rng(1).uniform(0, 1, 400)
    value = filled(*scores).value("m")
    assert value.value == pytest.approx(scores.mean()) and value.stderr_by == "bootstrap"
    assert value.stderr == pytest.approx(scores.std() / 20, rel=0.1)  # of a mean it is known
    assert filled(*scores).value("m") == value  # the same each time


def test_perplexity_weighs_rows_by_their_length() -> None:
    value = filled([10.0, 5.0], [30.0, 5.0]).value("m_perplexity")
    assert value.value == pytest.approx(math.exp(4.0)) and value.stderr is not None and value.stderr > 0


def test_one_row_has_no_spread() -> None:
    assert filled([10.0, 5.0]).value("m_perplexity")[2:] == (None, "none", 1)


def test_a_metric_that_no_row_has() -> None:
    assert Tally().value("m") == ("m", None, None, "none", 0)


def test_rates_and_groups() -> None:
    tallies = tally(
        [
            sample(group="a", scores={"m": 1.0}, finish_reason="length"),
            sample("no answer", group="a", scores={"m": 0.0}),
            sample("error", group="b", scores={"m": 0.0}, finish_reason="error"),
            sample("right", scores={"m": 1.0}, samples=[sample(), sample("not run")]),
        ]
    )
    assert [*tallies] == ["", "a", "b"]
    assert tallies["a"].rates() == {"extraction_failure_rate": 0.5, "truncation_rate": 0.5}
    total = tallies[""]
    assert (total.rows, total.errors, total.first_error) == (4, 1, "row a: it is so")
    assert (total.outputs, total.not_run, total.value("m").value) == (4, 1, 0.5)
