"""Where the answers of a job go, and which rows of it are done already.

    OUT.jsonl, rows as they finish     is its own journal
    any other file                     is written from OUT.journal.jsonl when the last row is there
    stdout, a pipe or a device         gets rows as they finish; nothing can go on with it later

Knows files and what may be mixed in one. Does not know how rows are answered.
"""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from minisgl.batch_run.answers import Line
from minisgl.batch_run.files import check_writable, is_stream
from minisgl.batch_run.journal import Journal, in_use, is_locked
from minisgl.batch_run.manifest import Manifest, load_manifest, manifest_path
from minisgl.batch_run.rows import NEARLY, Record, Value
from minisgl.batch_run.streams import SpooledStream, Stream
from minisgl.batch_run.tables import TABLES, write_table
from minisgl.errors import MinisglError

NOT_WRITTEN = (".json", ".txt", ".gz", ".zst")
JOURNAL_SUFFIX = ".journal.jsonl"


class Output(Protocol):
    """What a job writes to.

    target: its name for people. place: where finished rows are before the job has ended. can_go_on: whether another
    run can. num_rows, num_failed: rows in it, with those of earlier runs.
    """

    @property
    def target(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def can_go_on(self) -> bool: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_failed(self) -> int: ...

    def has(self, record: Record, key_of: Callable[[Value], int]) -> bool:
        """Whether a row is done: asked once of each in the input. MinisglError for one that was another row then, which
        the key of its value tells."""

    def append(self, lines: Sequence[Line]) -> None:
        """Write finished rows."""

    def read(self, index: int) -> bytes:
        """The line of a row that is done."""

    def finish(self, *, input_end: int | None) -> None:
        """End a job that has no row left; `input_end`: the index after the input's last row, if it was read so far."""

    def close(self) -> None:
        """End a job in any way; what was appended stays."""


def open_output(
    target: str,
    manifest: Manifest,
    *,
    ordered: bool = False,
    dedup: bool = False,
    fresh: bool = False,
    retry_errors: bool = False,
) -> Output:
    """The output `target`, "-" being stdout, locked and ready to go on. MinisglError when that cannot be.

    `fresh` throws away what is there, once the first row is done; `retry_errors` throws away the rows that failed.
    """
    if target == "-" or is_stream(Path(target)):
        if retry_errors:
            raise MinisglError("--retry-errors needs an output that can be read again: name a file with -o")
        return SpooledStream(target, ordered) if ordered or dedup else Stream(target)
    return OutputFile(Path(target), manifest, ordered=ordered, fresh=fresh, retry_errors=retry_errors)


def check_target(target: str) -> None:
    """MinisglError, before anything is loaded, when `target` cannot be an output."""
    formats, suffix = (".jsonl", *TABLES), Path(target).suffix
    misspelt = suffix not in formats and get_close_matches(suffix, formats, n=1, cutoff=NEARLY)
    if target.endswith(NOT_WRITTEN) or misspelt:
        raise MinisglError(f"{target}: results are written as .jsonl, .csv or .parquet; name such a file with -o")
    if target == "-" and sys.stdout is None:
        raise MinisglError("stdout is closed; name a file for the results with -o")
    if target != "-":
        check_writable(Path(target), "-o")


def journal_path(path: Path, *, ordered: bool) -> Path:
    """The journal of an output: itself where it may be, else the file beside it."""
    is_own = path.suffix not in TABLES and not ordered
    return path if is_own else path.with_name(path.name + JOURNAL_SUFFIX)


def own_files(target: str) -> list[Path]:
    """Whatever a job with this output may write."""
    if target == "-":
        return [Path("/dev/stdout")]
    path = Path(target)
    return [path, journal_path(path, ordered=True), manifest_path(path)]


class OutputFile:
    """A results file, its journal and its manifest."""

    can_go_on = True

    def __init__(self, path: Path, manifest: Manifest, *, ordered: bool, fresh: bool, retry_errors: bool):
        self.path, self.manifest, self.ordered = path, manifest, ordered
        self.manifest_path = manifest_path(path)
        self.journal_path = journal_path(path, ordered=ordered)
        self._made, self._begun = not self.journal_path.exists(), False
        self.journal = Journal(self.journal_path)  # first of all the lock: what is looked at below cannot change then
        try:
            other = journal_path(path, ordered=not ordered)
            if other != self.journal_path and is_locked(other):
                raise in_use(path)
            before = self._check_ours(fresh)
            self._to_clear = fresh or before is None or before.settings != manifest.settings
            if not self._to_clear:
                self.journal.load()
            if retry_errors and self.journal.num_failed:
                self.manifest.save(self.manifest_path)  # no longer a complete one
                self.journal.keep(lambda line: not line.failed)
            self._changed = not (before and before.complete and path.exists()) or self._to_clear or retry_errors
            self._num_before, self._num_skipped = self.journal.num_rows, 0
        except BaseException:
            self.close()
            raise

    @property
    def target(self) -> str:
        return str(self.path)

    @property
    def place(self) -> str:
        return str(self.journal_path)

    @property
    def num_rows(self) -> int:
        return self.journal.num_rows

    @property
    def num_failed(self) -> int:
        return self.journal.num_failed

    def _check_ours(self, fresh: bool) -> Manifest | None:
        """The manifest of what is there; MinisglError when it must not be touched."""
        if fresh:
            return None
        before = load_manifest(self.manifest_path)
        num_bytes = sum(path.stat().st_size for path in {self.path, self.journal_path} if path.exists())
        if before is None and num_bytes:
            raise MinisglError(
                f"{self.path} exists and is no output to go on with ({self.manifest_path.name} is missing): "
                "--fresh replaces it, or name another output with -o"
            )
        if before and num_bytes and (changes := before.differences(self.manifest)):
            go_on = f"--dtype {before.settings['dtype']} goes on with it, " if [*changes] == ["dtype"] else ""
            raise MinisglError(
                f"{self.path} was made by another command: {'; '.join(changes.values())}. "
                f"{go_on}--fresh starts it anew, or name another output with -o"
            )
        return before

    def has(self, record: Record, key_of: Callable[[Value], int]) -> bool:
        key = self.journal.key(record.index)
        if not key:
            return False
        if key != key_of(record.value):
            raise MinisglError(
                f"the input has changed: {record.place} is not the row that {self.journal_path} has an answer for. "
                "--fresh starts anew, or name another output with -o"
            )
        self._num_skipped += 1
        return True

    def append(self, lines: Sequence[Line]) -> None:
        self._begin()
        self._changed = True
        self.journal.append(lines)

    def _begin(self) -> None:
        """Before the first row: now what was there may go. In an order in which a crash never mixes two jobs."""
        if not self._begun:
            if self._to_clear:
                self.journal.clear()
            self.manifest.save(self.manifest_path)
            self._begun = True

    def read(self, index: int) -> bytes:
        return self.journal.read(index)

    def finish(self, *, input_end: int | None) -> None:
        """Make the output durable and whole. MinisglError when it has rows that the input no longer has."""
        self._begin()
        self.journal.finish()
        if input_end is not None and self._num_skipped != self._num_before:
            raise MinisglError(
                f"the input has changed: {self._num_before - self._num_skipped:,} rows in {self.journal_path} are no "
                "longer in it. --fresh starts anew, or name another output with -o"
            )
        if self.journal_path != self.path and self._changed:
            write_table(self.path, lambda: self.journal.lines(ordered=self.ordered))
        Manifest(self.manifest.settings, input_end, self.num_rows).save(self.manifest_path)

    def close(self) -> None:
        if self._made and not self._begun and not self.journal_path.stat().st_size:
            self.journal_path.unlink()  # while it is locked: another process may wait to write it
        self.journal.close()
