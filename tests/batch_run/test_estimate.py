import json
from pathlib import Path

import pytest

from minisgl.batch_run.estimate import estimate
from minisgl.batch_run.job import JobOptions
from minisgl.demo import MODEL_PATH

pytestmark = pytest.mark.skipif(not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's tokenizer")


def test_a_dry_run_finds_what_a_run_would_refuse(tmp_path: Path) -> None:
    refused = [
        {"prompt": ""},
        {"prompt": "x", "min_tokens": 9, "max_tokens": 6},
        {"prompt": "x", "stop_token_ids": [99999]},
        {"prompt": "x", "logit_bias": {"99999": 1}},
        {"prompt": "x", "bad_words": ["a word that has many tokens"]},
        {"prompt_token_ids": [99999]},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*refused, {"prompt": "x"}]))
    first, *_ = estimate(JobOptions([str(prompts)], engine={"device": "cpu"})).splitlines()
    assert first.startswith("rows     7, of which 6 would fail")


def test_a_dry_run_counts_what_a_run_would_do(tmp_path: Path) -> None:
    rows = [
        {"prompt_token_ids": [1] * 10, "max_tokens": 5},
        {"prompt_token_ids": [1] * 10, "max_tokens": 5},
        {"prompt_token_ids": [2] * 60, "max_tokens": 50, "n": 2},
        {"prompt_token_ids": [2] * 64},
        {"nothing": 1},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("not JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    options = JobOptions([str(prompts)], engine={"device": "cpu", "max_len": 64}, dedup=True)
    lines = dict(line.split(None, 1) for line in estimate(options).splitlines())
    assert lines["rows"] == "6, of which 3 would fail (1 invalid_json, 1 prompt_too_long, 1 invalid_row)"
    assert lines["tokens"] == "130 prompt, at most 13 output"  # 10 + 2 x 60; 5 + 2 x the 4 that are left
    assert lines["memory"].startswith("0.02 GiB weights") and "3 rows at once of 48 tokens (float32)" in lines["memory"]
    assert "or more for all of that, on cpu" in lines["time"]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"], "nothing is written"
