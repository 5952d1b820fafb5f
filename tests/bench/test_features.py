"""The bench of features on the demo model, and the tokenizer that it gives to a model that has none."""

import json
import sys

import pytest

from minisgl.bench import features
from minisgl.demo import MODEL_PATH

SMALL = {"batch": 2, "input_len": 4, "output_len": 16, "repeats": 1, "warmups": 0, "device": "cpu"}


def measure(**options):
    return {row["feature"]: row for row in features.run(str(MODEL_PATH), **SMALL, **options)}


def test_every_line_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(features, "JUMPS", (4, 8))
    monkeypatch.setattr(features, "PROFILED_STEPS", 1)
    rows = measure(json_path=tmp_path / "rows.jsonl")
    assert [json.loads(line)["feature"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == list(rows)
    asked = {"penalties", "logit_bias", "logprobs=5", "min_p", "top_p", "regex", "json_schema", "deterministic"}
    assert set(rows) == asked | {features.FIRST, "plain", "4 forced tokens", "4 at once"}
    for row in rows.values():
        assert row["decode_tokens_per_s"] > 0 and len(row["cost_percent_all"]) == 1
    launches = {name: row["launches_per_step"] for name, row in rows.items()}
    assert launches["plain"] == launches[features.FIRST], "what others asked for costs plain requests something"
    assert all(launches[name] > launches["plain"] for name in asked)
    assert launches["4 at once"] != launches["4 forced tokens"]
    assert "against 4 forced tokens" in features.table(rows["4 at once"])


def test_a_line_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(features, "features", lambda output_len: [features.Line("plain"), *all_lines(output_len)[-2:]])
    monkeypatch.setattr(features, "jumps", lambda tokenizer, output_len: [])
    rows = measure()
    assert list(rows) == [features.FIRST, "plain", "deterministic", "json_schema"]
    assert "not measured: structured output needs the package llguidance" in features.table(rows["json_schema"])


all_lines = features.features


def test_a_model_without_a_tokenizer(tmp_path, monkeypatch):
    """Gets a synthetic one, by which grammars can be measured; with few ids it goes without."""
    pytest.importorskip("llguidance")
    config = json.loads((MODEL_PATH / "config.json").read_text())
    monkeypatch.setattr(features, "JUMPS", ())
    monkeypatch.setattr(features, "features", lambda output_len: [features.Line("plain"), all_lines(output_len)[-2]])
    small = {**SMALL, "load_format": "dummy"}
    for vocab_size, is_measured in ((1500, True), (300, False)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size, "num_hidden_layers": 1}))
        [*_, row] = features.run(str(tmp_path), **small)
        assert row["feature"] == "json_schema" and ("skipped" not in row) == is_measured
    assert "tokenizer" in row["skipped"] and len(list(tmp_path.iterdir())) == 1
