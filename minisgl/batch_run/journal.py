"""The record of the rows that are done: an append-only file of output lines that survives kills and power loss.

    append: handed to the operating system at once, fsynced by a thread every half second
    open:   locked against a second process; a last line that is torn is cut off

Knows lines, and of each only its index, key and whether it failed. Of a row that is done it keeps 16 bytes in memory.
"""

import fcntl
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

from minisgl.batch_run.answers import Line, parse_line
from minisgl.batch_run.files import replaced, sync_folder, write_failure
from minisgl.errors import MinisglError

SYNC_EVERY_S = 0.5  # a finished row is durable within a second, with room for a slow disk


class Journal:
    """The lines of one file, by row index. Opening it locks it, for as long as the process lives or until `close`.

    num_rows, num_failed: of the rows in it. size: bytes of its whole lines.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        """Open or make the file. MinisglError when it cannot be written, or when another process has it. One that is
        `read_only` must be there, is not repaired, and may be read by several processes."""
        self.path, self.read_only = path, read_only
        self._failure: OSError | None = None
        self._closing = Event()
        self._syncing: Thread | None = None
        self._fd = self._lock()
        self._forget()

    def _lock(self) -> int:
        """A locked descriptor of the file that has the name now: another process may replace it while we wait."""
        mode = os.O_RDONLY if self.read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND
        while True:
            try:
                fd = os.open(self.path, mode | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise write_failure(str(self.path), error) from error
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
                os.close(fd)
            except FileNotFoundError:
                os.close(fd)
            except OSError:
                os.close(fd)
                raise in_use(self.path) from None

    def _forget(self) -> None:
        self.num_rows = self.num_failed = 0
        self.size = self._synced = 0
        self._keys = array("Q")  # by index; 0: not done
        self._starts = array("Q")  # by index: where its line starts

    def key(self, index: int) -> int:
        """The key of the row that is done, or 0."""
        return self._keys[index] if index < len(self._keys) else 0

    # -- what is there --

    def load(self) -> None:
        """Read the lines that are there and repair the file: what a crash left of the last ones is cut off; lines
        before good ones that are no results, or a row's second one, are taken out. MinisglError when it cannot be."""
        self._forget()
        damaged = rewrite = False
        for start, data in self._scan():
            line = parse_line(data)
            if line is None or self.key(line.index):
                damaged = True
                continue
            rewrite |= damaged
            self._enter(line, start)
            self.size = start + len(data)
        if self.read_only:
            return
        if rewrite:
            self.keep(lambda line: True)
        else:
            self._cut()

    def keep(self, wanted: Callable[[Line], bool]) -> None:
        """Write the file anew with the wanted lines only; a crash leaves the old file or the new one."""
        self._forget()
        with replaced(self.path) as file:
            fd = os.dup(file.fileno())  # the lock goes with it
            fcntl.flock(fd, fcntl.LOCK_EX)
            for _, data in self._scan():
                line = parse_line(data)
                if line and not self.key(line.index) and wanted(line):
                    file.write(data)
                    self._enter(line, self.size)
                    self.size += len(data)
        os.close(self._fd)
        self._fd = fd
        self._synced = self.size

    def clear(self) -> None:
        """Throw everything away."""
        self._forget()
        self._cut()

    def read(self, index: int) -> bytes:
        """The line of a row that is done."""
        with self._reader() as file:
            file.seek(self._starts[index])
            return file.readline()

    def lines(self, *, ordered: bool) -> Iterator[bytes]:
        """All lines, as they were written or in the order of the rows."""
        if not ordered:
            yield from (data for _, data in self._scan())
            return
        yield from (data for _, data in self.items())

    def items(self) -> Iterator[tuple[int, bytes]]:
        """Index and line of each row, in the order of the rows."""
        with self._reader() as file:
            for index, key in enumerate(self._keys):
                if key:
                    file.seek(self._starts[index])
                    yield index, file.readline()

    def _reader(self) -> BinaryIO:
        file = os.fdopen(os.dup(self._fd), "rb")
        file.seek(0)  # a duplicate shares its place in the file, which nothing else here uses
        return file

    def _scan(self) -> Iterator[tuple[int, bytes]]:
        start = 0
        with self._reader() as file:
            for data in file:
                yield start, data
                start += len(data)

    def _enter(self, line: Line, start: int) -> None:
        room = line.index + 1 - len(self._keys)
        if room > 0:
            self._keys.frombytes(bytes(8 * room))
            self._starts.frombytes(bytes(8 * room))
        self._keys[line.index], self._starts[line.index] = line.key, start
        self.num_rows += 1
        self.num_failed += line.failed

    def _cut(self) -> None:
        """End the file after its whole lines."""
        try:
            if os.fstat(self._fd).st_size > self.size:
                os.ftruncate(self._fd, self.size)
                os.fsync(self._fd)
            self._synced = self.size
        except OSError as error:
            raise write_failure(str(self.path), error) from error

    # -- what is added --

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines and hand them to the operating system at once: a killed process loses nothing it has written.

        MinisglError when that fails, or when lines before could not be made durable; the file then ends with the last
        line that was written whole.
        """
        if self._failure:
            raise write_failure(str(self.path), self._failure) from self._failure
        data = b"".join(line.data for line in lines)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, memoryview(data)[written:], self.size + written)
        except OSError as error:
            self._enter_written(lines, written)
            with suppress(MinisglError):  # the next start cuts it off
                self._cut()
            raise write_failure(str(self.path), error) from error
        self._enter_written(lines, written)
        if self._syncing is None:
            sync_folder(self.path)
            self._syncing = Thread(target=self._sync_often, name="journal-sync", daemon=True)
            self._syncing.start()

    def _enter_written(self, lines: Sequence[Line], written: int) -> None:
        for line in lines:
            written -= len(line.data)
            if written < 0:
                return
            self._enter(line, self.size)
            self.size += len(line.data)

    def _sync_often(self) -> None:
        while not self._closing.wait(SYNC_EVERY_S) and self._failure is None:
            self._sync()

    def _sync(self) -> None:
        size = self.size
        if size != self._synced:
            try:
                os.fsync(self._fd)
                self._synced = size
            except OSError as error:
                self._failure = error

    def finish(self) -> None:
        """Make everything durable. MinisglError when that fails."""
        self._stop_syncing()
        self._sync()
        if self._failure:
            raise write_failure(str(self.path), self._failure) from self._failure

    def close(self) -> None:
        """Sync what is there and unlock. An error here would hide the one before."""
        self._stop_syncing()
        self._sync()
        os.close(self._fd)

    def _stop_syncing(self) -> None:
        self._closing.set()
        if self._syncing is not None:
            self._syncing.join()


def is_locked(path: Path) -> bool:
    """Whether another process has this journal."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def in_use(path: Path) -> MinisglError:
    return MinisglError(f"another minisgl is writing {path}: wait until it ends, or name another output with -o")
