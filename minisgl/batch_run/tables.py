"""Output files that are written in one go from a journal's lines: .jsonl in order, .csv and .parquet.

Knows formats. Does not know where lines come from. A table has one column for each key of the rows; usage and error are
spread over several. A column whose values are of one kind keeps it; anything else is text, lists and objects as JSON.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minisgl.batch_run.files import replaced

TABLES = (".csv", ".parquet")
CHUNK_ROWS = 1000
# By key of a row, the column of each key in it.
SPREAD = {
    "usage": {name: name for name in ("prompt_tokens", "completion_tokens", "cached_tokens")},
    "error": {name: f"error_{name}" for name in ("type", "message")},
}

Lines = Callable[[], Iterator[bytes]]


def write_table(path: Path, lines: Lines) -> None:
    """Write the lines to `path` in the format of its suffix, in place of what was there. Memory does not grow with
    their number: `lines` is called once for the columns and once for the rows. MinisglError when it cannot be written.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, lines)
    elif path.suffix == ".csv":
        _write_csv(path, lines)
    else:
        with replaced(path) as file:
            file.writelines(lines())


def _write_csv(path: Path, lines: Lines) -> None:
    kinds = _kinds(lines())
    with replaced(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(text, list(kinds))
        writer.writeheader()
        for row in map(_spread, lines()):
            writer.writerow({name: value if isinstance(value, (int, float)) else _text(value) for name, value in row})
        text.detach()


def _write_parquet(path: Path, lines: Lines) -> None:
    import pyarrow as pa  # not at the top: JSON lines need it not
    import pyarrow.parquet as pq

    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "ids": pa.list_(pa.int32())}
    kinds = _kinds(lines())
    schema = pa.schema([(name, types.get(kind, pa.string())) for name, kind in kinds.items()])
    rows = map(_spread, lines())
    with replaced(path) as file, pq.ParquetWriter(file, schema) as writer:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            typed = [{name: _text(value) if kinds[name] == "text" else value for name, value in row} for row in chunk]
            writer.write_table(pa.Table.from_pylist(typed, schema))


def _spread(line: bytes) -> list[tuple[str, Any]]:
    """The cells of a row."""
    cells: list[tuple[str, Any]] = []
    values = json.loads(line)
    spread = SPREAD if "usage" in values else {}  # OpenAI's lines have another form
    for name, value in values.items():
        inner = spread.get(name)
        if inner and (value is None or set(value) == set(inner)):
            cells += [(column, None if value is None else value[key]) for key, column in inner.items()]
        else:
            cells.append((_text(name) or "", value))
    return cells


def _kinds(lines: Iterator[bytes]) -> dict[str, str]:
    """For each column, in the order of first sight, the kind that holds all of its values."""
    kinds: dict[str, str] = {}
    for line in lines:
        for name, value in _spread(line):
            kind = _kind(name, value)
            before = kinds.setdefault(name, kind)
            if before != kind and kind:
                kinds[name] = kind if not before else "float" if {before, kind} == {"int", "float"} else "text"
    return kinds


def _kind(name: str, value: Any) -> str:
    """ "" for null, which any column may hold."""
    if value is None:
        return ""
    if name == "token_ids":
        return "ids"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**53) <= value <= 2**53 else "text"  # beyond, a column with floats too would round it
    return "float" if isinstance(value, float) else "text"


def _text(value: Any) -> str | None:
    """A cell of text; null stays null. Half a surrogate pair, which no table can hold, is written as its escape."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()
