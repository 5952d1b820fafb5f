"""Rows out of files of each format: lazily, in bounded memory, each with its index.

Knows formats. Does not know what a row says. A row that cannot be read is a RowError in its place wherever a format
lets the rows after it be found. Libraries are imported when a format needs them; JSON lines and text need none.
"""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TextIO, cast

from minisgl.batch_run.rows import PARAMETERS, SOURCES, RefusedRow, RowError, Value, read_prompt, row_error
from minisgl.errors import MinisglError

# Longer than any context (a million token ids are 7 MB); a file without line ends must not be read into memory whole.
MAX_LINE_BYTES = 64 * 1024 * 1024
COMPRESSIONS = (".gz", ".zst")
PYTHONS = {"True": "true", "False": "false"}  # as pandas writes them
PARQUET_BATCH_ROWS = 256
CHUNK_CHARS = 1 << 14
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"

Rows = Iterator[tuple[int, Value]]


def open_compressed(path: Path) -> BinaryIO:
    """A file for reading; what .gz and .zst hold when it is one of them. OSError as open() raises it."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd"), 1 << 20)
    return path.open("rb")


def read_lines(file: BinaryIO) -> Rows:
    """Lines of JSON: each that is not blank, unparsed."""
    index = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        too_long = len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")
        while too_long and not line.endswith(b"\n") and line:
            line = file.readline(MAX_LINE_BYTES)
        if index == 0:
            line = line.removeprefix(_BOM)
        if too_long:
            yield index, row_error("invalid_row", f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB")
        elif line := line.strip(_BLANK):
            yield index, line
        index += 1


def read_text(file: BinaryIO) -> Rows:
    """Lines of text that are not blank: a prompt each."""
    for index, line in read_lines(file):
        if isinstance(line, bytes):
            try:
                yield index, line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
                yield index, row_error("invalid_prompt", message)
        else:
            yield index, line


def read_json(file: BinaryIO) -> Rows:
    """The elements of a JSON array. A file of JSON lines, which many call .json too, is read as such."""
    buffered = io.BufferedReader(cast(Any, file))
    start = buffered.peek(1 << 16).removeprefix(_BOM).lstrip()
    if start[:1] != b"[":
        yield from read_lines(cast(BinaryIO, buffered))
        return
    index = -1
    try:
        # What is no UTF-8 becomes halves of surrogate pairs and itself again, so that only its own row is refused.
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape")
        for index, element in enumerate(_elements(text)):
            yield index, element.encode("utf-8", "surrogateescape")
    except RecursionError:
        raise MinisglError(f"element {index + 2:,} of the JSON array is nested too deeply: repair it") from None
    except ValueError as error:
        raise MinisglError(f"the JSON array breaks off after {index + 1:,} elements ({error}): repair it") from error


def _elements(file: TextIO) -> Iterator[str]:
    """The text of each element of a JSON array; ValueError where it is not JSON. Reads as far as the next element."""
    decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode  # where an element ends is all that counts
    text, separator = file.read(CHUNK_CHARS), "["
    while True:
        text = text.lstrip()
        if not text and not (text := file.read(CHUNK_CHARS).lstrip()):
            raise ValueError("it does not end")
        if text[0] == "]" and separator == ",":
            return _check_nothing_more(text[1:], file)
        if text[0] != separator:
            raise ValueError(f"{separator} expected")
        rest = text[1:].lstrip()
        while True:
            if separator == "[" and rest.startswith("]"):
                return _check_nothing_more(rest[1:], file)
            try:
                _, end = decode(rest)
                failure = None
            except ValueError as error:
                failure, end = error, len(rest)
            if rest[end:].lstrip().startswith((",", "]")):
                break  # else the element may go on in what is not read yet, if only by a digit
            more = file.read(max(CHUNK_CHARS, len(rest))) if len(rest) < MAX_LINE_BYTES else ""
            if not more:
                raise failure or ValueError("it does not end")
            rest = (rest + more).lstrip()
        yield rest[:end]
        text, separator = rest[end:], ","


def _check_nothing_more(text: str, file: TextIO) -> None:
    while not text.strip():
        if not (text := file.read(CHUNK_CHARS)):
            return
    raise ValueError("there is text after its end")


def read_csv(file: BinaryIO) -> Rows:
    """The rows of a table with a header. Cells are text; those of parameters are read as JSON where they are."""
    csv.field_size_limit(MAX_LINE_BYTES)
    # What is no UTF-8 becomes halves of surrogate pairs, so that only its own row is refused.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = csv.reader(text, strict=True)
    try:
        names = next(lines, [])
    except csv.Error as error:
        raise MinisglError(f"the header of the CSV file is none: {error}") from error
    if len(set(names)) < len(names):
        raise MinisglError(f"the header of the CSV file names a column twice: {', '.join(names)}")
    for index, cells in enumerate(_csv_rows(lines)):
        if isinstance(cells, RowError):
            yield index, cells
        elif len(cells) != len(names):
            yield index, row_error("invalid_row", f"the row has {len(cells)} cells; the header has {len(names)}")
        else:
            try:
                yield index, {name: _cell(name, read_prompt(cell)) for name, cell in zip(names, cells, strict=True)}
            except RefusedRow:
                yield index, row_error("invalid_row", "the row is not UTF-8")


def _csv_rows(lines: Any) -> Iterator[list[str] | RowError]:
    while True:
        first = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # all that follows would be one cell
                raise MinisglError(f"a quote opens in line {first} or after it and never closes: repair it") from error
            yield row_error("invalid_row", f"not a row of CSV: {error}")
        else:
            if cells:  # not a blank line
                yield cells


def _cell(name: str, text: str) -> Any:
    if name in ("n", "messages", "prompt_token_ids") or (name in PARAMETERS and name not in SOURCES):
        try:
            value = json.loads(PYTHONS.get(text, text)) if text else None
        except (ValueError, RecursionError):
            return text
        # A column of integers with gaps is one of floats to pandas.
        return int(value) if isinstance(value, float) and value.is_integer() else value
    return text


def read_parquet(file: BinaryIO) -> Rows:
    """The rows of a Parquet file, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with TemporaryFile() as unpacked:
        if isinstance(file, gzip.GzipFile) or not file.seekable():
            shutil.copyfileobj(file, unpacked)  # the format begins at the end of the file
            file = cast(BinaryIO, unpacked)
        try:
            batches = pq.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH_ROWS)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches))
        except pa.ArrowException as error:
            raise MinisglError(f"not a readable Parquet file: {str(error).splitlines()[0]}") from error


def count_parquet(path: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        count: int = pq.ParquetFile(path).metadata.num_rows
    except (pa.ArrowException, OSError):  # reading it says what is wrong
        return None
    return count
