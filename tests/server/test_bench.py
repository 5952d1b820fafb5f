"""`bench serve` against a running server."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs the extra bench")

from minisgl.bench import serve
from minisgl.errors import MinisglError


def test_a_run_for_each_rate(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows_path, plot = tmp_path / "rows.jsonl", tmp_path / "load.png"
    limits = {"ttft": 1e6, "itl": 1e6}
    rates = (100.0, float("inf"))
    run = serve.run(server.url, "70x3x8", request_rates=rates, goodput=limits, json_path=rows_path, plot_path=plot)
    rows = list(run)
    assert [json.loads(line) for line in rows_path.read_text().splitlines()] == rows
    assert plot.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert (row["requests"], row["failed"], row["prompt_tokens"], row["output_tokens"]) == (8, 0, 560, 24)
        assert row["engine"] == "minisgl" and row["model"] == "demo" and row["dtype"] == "float32"
        assert row["cache_flushed"] and row["cached_tokens"] == 0
        assert row["goodput"]["share"] == 1
        assert 0 < row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"] and row["itl_ms"]["mean"] > 0
    assert [row["request_rate"] for row in rows] == [100.0, None]
    assert "100 requests/s" in serve.table(rows[0]) and "all at once" in serve.table(rows[1])


def test_a_closed_loop_and_a_file(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "What is 2 + 3?", "max_tokens": 2}\n'
        '{"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 2}\n'
        '{"prompt_token_ids": [1, 2, 3], "max_tokens": 3}\n'
    )
    [row] = serve.run(server.url, str(path), max_concurrency=1)
    assert row["workload"] == "prompts.jsonl"
    assert (row["requests"], row["failed"], row["prompt_tokens"]) == (3, 0, 8 + 16 + 3)
    assert row["max_concurrency"] == 1 and "at most 1 together" in serve.table(row)
    path.write_text('{"prompt_token_ids": [9999999], "max_tokens": 2}\n{"prompt": "a", "max_tokens": 2}\n')
    [row] = serve.run(server.url, str(path))
    assert row["failed"] == 1 and "invalid_token_id" in row["first_error"]
    assert "failed            1, the first: status 400" in serve.table(row)
    path.write_text(json.dumps({"prompt_token_ids": [1] * 2046, "max_tokens": 9}) + "\n")
    with pytest.raises(MinisglError, match="first error: the answer has 2 of 9 tokens"):
        list(serve.run(server.url, str(path)))
