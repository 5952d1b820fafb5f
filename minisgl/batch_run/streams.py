"""Outputs that cannot be read again: stdout, pipes and devices. Rows go out as they finish, or from a spool at the end.

Knows files. Nothing can go on with such an output later.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

from minisgl.batch_run.answers import Line
from minisgl.batch_run.files import write_failure
from minisgl.batch_run.journal import Journal
from minisgl.batch_run.rows import Record, Value


class Stream:
    """Stdout, a pipe or a device: rows go out as they finish, and no copy is kept."""

    can_go_on = False

    def __init__(self, target: str):
        self.target = self.place = "stdout" if target == "-" else target
        self._is_stdout = target == "-"
        self.num_rows = self.num_failed = 0
        self._file: BinaryIO | None = None

    def has(self, record: Record, key_of: Callable[[Value], int]) -> bool:
        return False

    def append(self, lines: Sequence[Line]) -> None:
        """Write the lines and flush. MinisglError when that fails."""
        self._write(line.data for line in lines)
        self.num_rows += len(lines)
        self.num_failed += sum(line.failed for line in lines)

    def _write(self, lines: Iterable[bytes]) -> None:
        try:
            if self._file is None:
                self._file = sys.stdout.buffer if self._is_stdout else _open_raw(self.target)
            for line in lines:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            self._file.flush()
        except OSError as error:
            self._silence()
            raise write_failure(self.target, error) from error

    def read(self, index: int) -> bytes:
        raise AssertionError("a stream cannot be read again")

    def finish(self, *, input_end: int | None) -> None:
        self._write([])

    def close(self) -> None:
        if self._file is not None and not self._is_stdout:
            with suppress(OSError):
                self._file.close()

    def _silence(self) -> None:
        """After a failed write to stdout, let Python flush the rest into nothing when it exits."""
        if self._is_stdout:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_raw(path: str) -> BinaryIO:
    return cast(BinaryIO, open(path, "wb", buffering=0))  # what failed to be written is not tried again


class SpooledStream(Stream):
    """A stream that gets its rows at the end, from a temporary journal: in order, or with rows that repeat others."""

    def __init__(self, target: str, ordered: bool):
        super().__init__(target)
        self.ordered = ordered
        self._folder = TemporaryDirectory(prefix="minisgl-")
        self._journal = Journal(Path(self._folder.name) / "journal.jsonl")

    def append(self, lines: Sequence[Line]) -> None:
        self._journal.append(lines)
        self.num_rows, self.num_failed = self._journal.num_rows, self._journal.num_failed

    def read(self, index: int) -> bytes:
        return self._journal.read(index)

    def finish(self, *, input_end: int | None) -> None:
        self._write(self._journal.lines(ordered=self.ordered))

    def close(self) -> None:
        super().close()
        self._journal.close()
        self._folder.cleanup()
