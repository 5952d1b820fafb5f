"""Stderr, which a job does not depend on: a message that cannot be written is lost, and nothing else is.

Its disk may be full, or who reads it may have left.
"""

import io
from typing import Any, TextIO


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)  # None where it would have to wait
        except OSError:
            return len(data)


def lossy(stream: TextIO | None) -> TextIO | None:
    """The same stream, but that it never fails; as it is where it is no file (closed, or captured by a test)."""
    if stream is None:
        return None
    try:
        raw = _Lossy(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)
