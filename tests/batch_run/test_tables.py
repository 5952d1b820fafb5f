"""CSV, Parquet and ordered JSON lines hold what the journal does: types, numbers that are not finite, odd Unicode."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.batch_run import tables
from minisgl.batch_run.tables import write_table
from minisgl.errors import MinisglError

ROW = {"id": "a", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0}, "error": None}
ROWS: list[dict[str, Any]] = [
    {
        **ROW,
        "half \ud83d": 1,
        "token_ids": [1, 2],
        "score": 1,
        "flag": True,
        "mixed": 1,
        "nested": {"a": [1]},
        "rare": None,
    },
    {**ROW, "token_ids": [], "score": float("nan"), "flag": None, "mixed": "x", "nested": None, "text": "é\u2028\n\0"},
    {
        **ROW,
        "error": {"type": "t", "message": "m"},
        "score": float("-inf"),
        "flag": False,
        "big": 2**70,
        "text": "\ud83d",
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_table(path, lambda: (json.dumps(row).encode() + b"\n" for row in rows))
    return path


def test_parquet(tmp_path: Path) -> None:
    table = pq.read_table(write(tmp_path / "rows.parquet", ROWS))
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    assert types["score"] == "double" and types["flag"] == "bool" and types["token_ids"].startswith("list<")
    assert types["completion_tokens"] == "int64" and types["mixed"] == types["big"] == types["rare"] == "string"
    first, second, third = table.to_pylist()
    assert (first["token_ids"], second["token_ids"], third["token_ids"]) == ([1, 2], [], None)
    assert (first["nested"], first["mixed"], second["mixed"], third["big"]) == ('{"a": [1]}', "1", "x", str(2**70))
    assert (first["score"], third["score"]) == (1.0, -math.inf) and math.isnan(second["score"])
    assert (second["text"], third["text"]) == ("é\u2028\n\0", "\\ud83d")
    assert (first["error_type"], third["error_type"], third["error_message"]) == (None, "t", "m")


def test_csv(tmp_path: Path) -> None:
    with write(tmp_path / "rows.csv", ROWS).open(newline="", encoding="utf-8") as file:
        first, second, third = csv.DictReader(file)
    assert (first["token_ids"], first["nested"], first["flag"], first["rare"]) == ("[1, 2]", '{"a": [1]}', "True", "")
    assert [float(row["score"]) for row in (first, third)] == [1, -math.inf] and math.isnan(float(second["score"]))
    assert (second["text"], third["text"]) == ("é\u2028\n\0", "\\ud83d")
    assert (third["error_type"], third["prompt_tokens"]) == ("t", "1")


def test_answers_to_lines_of_openai(tmp_path: Path) -> None:
    answer = {"id": "batch_req_0-1", "custom_id": "a", "response": {"status_code": 200}, "error": None}
    refusal = {**answer, "response": {"status_code": 400}, "error": {"code": "x", "message": "y"}}
    first, second = pq.read_table(write(tmp_path / "rows.parquet", [answer, refusal])).to_pylist()
    assert list(first) == list(answer) and json.loads(first["response"]) == {"status_code": 200}
    assert (first["error"], json.loads(second["error"])) == (None, {"code": "x", "message": "y"})


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    assert write(tmp_path / f"rows{suffix}", []).exists()


def test_more_rows_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHUNK_ROWS", 3)
    table = pq.read_table(write(tmp_path / "rows.parquet", [{"index": index} for index in range(10)]))
    assert table["index"].to_pylist() == list(range(10))


def test_an_old_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("old")

    def lines() -> Any:
        yield b'{"a": 1}\n'
        raise OSError(28, "No space left on device")

    with pytest.raises((MinisglError, OSError), match="No space left"):
        write_table(path, lines)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["rows.csv"]


cells = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.lists(st.integers())


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), cells, min_size=1), min_size=1, max_size=5))
def test_any_cells(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("any")
    assert pq.read_table(write(path / "rows.parquet", rows)).num_rows == len(rows)
    with write(path / "rows.csv", rows).open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
