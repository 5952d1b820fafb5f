"""Starts in processes of their own, with nothing compiled and with everything."""

import json
from pathlib import Path

import pytest

from minisgl.bench import start
from minisgl.demo import MODEL_PATH
from minisgl.errors import MinisglError


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_both_caches(tmp_path: Path, device: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows = list(start.run(str(MODEL_PATH), repeats=1, json_path=path, device=device, dtype="float32", num_pages=64))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert [row["caches"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert 0 < row["ready_s"] < row["answer_s"] and row["ready_s_all"] == [row["ready_s"]]
        assert row["options"] == {"dtype": "float32", "num_pages": 64} and row["dtype"] == "float32"
        assert (row["num_compiled"] > 10) == (row["caches"] == "cold" and device == "cuda")
        table = start.table(row)
        assert f"{row['caches']} caches" in table and f"ready_s      {row['ready_s']:.2f}" in table


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(MinisglError, match="does not start: .*NoSuchModel"):
        list(start.run(str(tmp_path), repeats=1, device="cpu"))


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.sys, "executable", "/bin/true")
    with pytest.raises(MinisglError, match="does not start: it ended without a word"):
        list(start.run(str(MODEL_PATH), repeats=1, device="cpu"))
