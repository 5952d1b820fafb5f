"""JSON lines out: where results go, and when they replace what was there.

Knows files. Does not know what a line says. A results file of an earlier run is replaced only when the first line of
the new one is written, so a run that fails before it has answered anything leaves the old results as they were.
"""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from minisgl.errors import MinisglError


def default_output(source: str) -> str:
    """prompts.jsonl -> prompts.results.jsonl beside it; stdin -> stdout."""
    if source == "-":
        return "-"
    path = Path(source)
    return str(path.with_name(path.name.removesuffix(".jsonl") + ".results.jsonl"))


class ResultWriter:
    """Writes whole lines to a file or, for "-", to stdout. Checks come first; the file is opened on first use."""

    def __init__(self, target: str, source: BinaryIO):
        """Check, before anything is loaded, that `target` can be written and is not the input that `source` reads."""
        self.target = target
        self._file: BinaryIO | None = None
        path = Path(target)
        if target != "-":
            _check_writable(path)
        if _is_same_file(source, None if target == "-" else path):
            raise MinisglError("the output is the input file, which would be lost; name another output with -o")

    def write(self, lines: list[bytes]) -> None:
        """Append the lines and hand them to the operating system at once: a killed run loses nothing it has written."""
        if self._file is None:
            self._file = sys.stdout.buffer if self.target == "-" else open(self.target, "wb")  # noqa: SIM115
        self._file.write(b"".join(lines))
        self._file.flush()

    def close(self) -> None:
        """Close the file. Every write was flushed, so an error here can only repeat one that was raised before."""
        if self._file is not None and self.target != "-":
            with suppress(OSError):
                self._file.close()


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
