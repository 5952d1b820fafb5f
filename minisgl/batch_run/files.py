"""Files that are replaced whole or not at all, and what to say when one cannot be written.

Knows files. Does not know what is in them.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minisgl.errors import MinisglError


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, durably; else `path` stays as it was. A link
    stays one, and a pipe or a device is written to.

    MinisglError when it cannot be written.
    """
    try:
        with path.open("wb") if is_stream(path) else _drafted(Path(os.path.realpath(path))) as file:
            yield file
    except OSError as error:
        raise write_failure(str(path), error) from error


@contextmanager
def _drafted(path: Path) -> Iterator[BinaryIO]:
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the name of a new file as durable as its content."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_failure(place: str, error: OSError) -> MinisglError:
    """The one line for an output that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "; free some space and run the same command again, or name a file on another disk with -o" if full else ""
    return MinisglError(f"cannot write {place}: {error.strerror}{fix}")


def read_text(source: str, flag: str) -> str | None:
    """The text of the file of that name; None when there is none, as for a text that is given on the line."""
    try:
        return Path(source).read_text(encoding="utf-8") if Path(source).is_file() else None
    except UnicodeDecodeError:
        raise MinisglError(f"{flag}: {source} is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # too long for a name, or not readable
        if isinstance(error, PermissionError):
            raise MinisglError(f"{flag}: {source} cannot be read: {error.strerror}") from error
        return None


def check_writable(path: Path, flag: str) -> None:
    """MinisglError, before anything is loaded, when a file that `flag` names cannot be written at `path`."""
    if path.is_dir():
        raise MinisglError(f"{path} is a folder; name a file with {flag}")
    if path.exists() and not _may_write(path):
        raise MinisglError(f"{path} cannot be written: permission denied; name another file with {flag}")
    if not path.parent.is_dir():
        raise MinisglError(f"the folder {path.parent} does not exist; make it first or name another file with {flag}")
    if not is_stream(path) and not _may_write(path.parent):
        raise MinisglError(f"the folder {path.parent} cannot be written to; name a file in another one with {flag}")


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device: it can be written, and neither read again nor replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()
