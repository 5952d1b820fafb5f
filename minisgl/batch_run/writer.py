"""JSON lines out: where results go, and when they replace what was there.

Knows files. Does not know what a line says. A results file of an earlier run is replaced only when the first line of
the new one is written, so a run that fails before it has answered anything leaves the old results as they were.
"""

import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from minisgl.errors import MinisglError


def default_output(source: str) -> str:
    """prompts.jsonl -> prompts.results.jsonl beside it; stdin -> stdout."""
    if source == "-":
        return "-"
    path = Path(source)
    return str(path.with_name(path.name.removesuffix(".jsonl") + ".results.jsonl"))


class ResultWriter:
    """Writes whole lines to a file or, for "-", to stdout. Checks come first; the file is opened on first use.

    num_rows: lines that were written.
    """

    def __init__(self, target: str, source: BinaryIO):
        """Check, before anything is loaded, that `target` can be written and is not the input that `source` reads."""
        self.target = target
        self._file: BinaryIO | None = None
        self.num_rows = 0
        self._num_bytes = 0  # of those rows
        path = Path(target)
        if target == "-" and sys.stdout is None:
            raise MinisglError("stdout is closed; name a file for the results with -o")
        if target != "-":
            _check_writable(path)
        if _is_same_file(source, None if target == "-" else path):
            raise MinisglError("the output is the input file, which would be lost; name another output with -o")

    def write(self, lines: list[bytes]) -> None:
        """Append the lines and hand them to the operating system at once: a killed run loses nothing it has written.

        MinisglError when that fails; a file then ends with the last line that was written whole.
        """
        data = b"".join(lines)
        rest = memoryview(data)
        try:
            if self._file is None:
                self._file = self._open()
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file.flush()
        except OSError as error:
            self._end(data[: len(data) - len(rest)])
            raise self._failure(error) from error
        self.num_rows += len(lines)
        self._num_bytes += len(data)

    def finish(self) -> None:
        """End a whole job: one without rows leaves an empty file. MinisglError for what is only found on closing."""
        self.write([])
        try:
            if self._file is not None and self.target != "-":
                self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Close the file of a job that may have failed: an error here would hide the first one."""
        if self._file is not None and self.target != "-":
            with suppress(OSError):
                self._file.close()

    def _open(self) -> BinaryIO:
        if self.target == "-":
            return sys.stdout.buffer
        return cast(BinaryIO, open(self.target, "wb", buffering=0))  # what failed to be written is not tried again

    def _end(self, written: bytes) -> None:
        """After a failed write: of what was still `written`, keep whole lines. Python flushes stdout into nothing."""
        with suppress(OSError, ValueError):
            if self.target == "-":
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            elif self._file is not None:
                self.num_rows += written.count(b"\n")
                self._file.truncate(self._num_bytes + written.rfind(b"\n") + 1)

    def _failure(self, error: OSError) -> MinisglError:
        place = "stdout" if self.target == "-" else self.target
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "; free some space, or name a file on another disk with -o" if full else ""
        return MinisglError(f"cannot write {place}: {error.strerror}{fix}")


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise MinisglError(f"{path} is a folder; name a file for the results with -o")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise MinisglError(f"{path} cannot be written: permission denied; name another file with -o")
    elif not path.parent.is_dir():
        raise MinisglError(
            f"the output folder {path.parent} does not exist; make it first or name another file with -o"
        )
    elif not os.access(path.parent, os.W_OK):
        raise MinisglError(f"the folder {path.parent} cannot be written to; name a file in another one with -o")


def _is_same_file(source: BinaryIO, path: Path | None) -> bool:
    """Whether the open input is the output file (None: stdout), by any name. Terminals and pipes never are."""
    try:
        before = os.fstat(source.fileno())
        after = path.stat() if path else os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):  # no such output yet, or a stream that is no file
        return False
    return stat.S_ISREG(before.st_mode) and os.path.samestat(before, after)
