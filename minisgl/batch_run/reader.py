"""JSON lines in: bytes to lines, one at a time, whatever the bytes are.

Knows files and lines. Does not know what a line says: `rows.parse_row` does.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from minisgl.batch_run.rows import BadRow, Row, parse_row, row_error
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams

# Longer than any context (a million token ids are 7 MB); a file without line ends must not be read into memory whole.
MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_COUNTED_BYTES = 4 * 1024**3  # counting the lines of a larger file, only for an ETA, takes too long
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


def open_input(source: str) -> BinaryIO:
    """Open a file, or stdin for "-". Raises MinisglError that says what to do."""
    if source == "-":
        if sys.stdin is None:
            raise MinisglError("stdin is closed; name a file of JSON lines")
        return sys.stdin.buffer
    path = Path(source)
    if path.is_dir():
        raise MinisglError(f"{source} is a folder; name a file of JSON lines in it")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise MinisglError(f"{source} does not exist; check the path, or give - to read stdin") from None
    except OSError as error:
        raise MinisglError(f"{source} cannot be read: {error.strerror}") from error


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not blank, with its index in the file from 0; None in place of a line that is too long."""
    index = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        too_long = len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")
        while too_long and not line.endswith(b"\n") and line:
            line = file.readline(MAX_LINE_BYTES)
        if index == 0:
            line = line.removeprefix(_BOM)
        if too_long:
            yield index, None
        elif line := line.strip(_BLANK):
            yield index, line
        index += 1


def read_rows(file: BinaryIO, defaults: SamplingParams, limit: int | None = None) -> Iterator[Row | BadRow]:
    """The file's first `limit` rows (None: all), parsed as they are asked for."""
    for index, line in islice(read_lines(file), limit):
        if line is None:
            error = row_error("invalid_row", f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB")
            yield BadRow(index, index, error)
        else:
            yield parse_row(line, index, defaults)


def count_rows(source: str, limit: int | None = None) -> int | None:
    """How many rows `read_rows` will give, for a progress bar; None when that cannot be known cheaply."""
    path = Path(source)
    if source == "-" or not path.is_file() or path.stat().st_size > MAX_COUNTED_BYTES:
        return None
    with path.open("rb") as file:
        return sum(1 for _ in islice(read_lines(file), limit))
