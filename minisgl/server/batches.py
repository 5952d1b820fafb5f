"""/v1/batches: the life of each batch, from a file of lines to files of answers.

    https://platform.openai.com/docs/api-reference/batch

    validating -> in_progress -> finalizing -> completed | expired
    validating -> failed;  validating | in_progress -> cancelling -> finalizing -> cancelled

Knows the states, and what is on the disk in each: after a crash or a restart a batch goes on where it was, with every
answer that it has. Does not know HTTP, or how a line is answered. Batches run one after another and yield to
interactive requests.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from minisgl.batch_run.answers import Line, format_line, parse_line
from minisgl.batch_run.formats import read_lines
from minisgl.batch_run.journal import Journal
from minisgl.batch_run.rows import BadRow, Record, Row, RowError
from minisgl.errors import MinisglError
from minisgl.openai.errors import FieldError
from minisgl.openai.responses import usage_of_response
from minisgl.request import Usage
from minisgl.server.answering import Answering
from minisgl.server.batch_rows import PARSER, RowAnswers, check_lines
from minisgl.server.engine_client import EngineDied
from minisgl.server.files import Catalogue, FileStore
from minisgl.server.served import ServedModel

log = logging.getLogger("minisgl.server")

WINDOW_S = 24 * 3600  # OpenAI's only completion_window
POLL_S = 0.1  # for room that interactive requests leave
EXPIRED = RowError("batch_expired", "the line was not answered before the completion window ended")
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class Counts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """OpenAI's batch object. Times are in seconds since 1970."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str | None = None
    errors: dict[str, Any] | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    output_expires_after: dict[str, Any] | None = None


class Batches:
    """All batches of a server, in `folder`."""

    def __init__(
        self, folder: Path, files: FileStore, rows: RowAnswers, answering: Answering, model: ServedModel
    ) -> None:
        self._batches = Catalogue(folder, Batch, "batch_", "batch_id")
        self._files = files
        self._rows = rows
        self._answering = answering
        self._model = model
        self._turn = asyncio.Lock()
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._num_running = 0  # answers

    def start(self) -> None:
        """Go on with what an earlier server left."""
        for batch in self._batches.all():
            if batch.status in UNFINISHED:
                self._begin(batch)

    async def close(self) -> None:
        """Stop; what is unfinished goes on when a server is started on the same folder."""
        lives = list(self._lives.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    def create(
        self,
        endpoint: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        output_expires_after: dict[str, Any] | None = None,
    ) -> Batch:
        """A new batch, which begins at once. FieldError when there is no such file."""
        self._files.get(input_file_id)
        now = int(time.time())
        batch = Batch(
            id=self._batches.new_id(),
            endpoint=endpoint,
            model=self._model.name,
            input_file_id=input_file_id,
            created_at=now,
            expires_at=now + WINDOW_S,
            metadata=metadata,
            output_expires_after=output_expires_after,
        )
        self._batches.put(batch.id, batch)
        self._begin(batch)
        return batch

    def all(self) -> list[Batch]:
        return self._batches.all()

    def get(self, id: str) -> Batch:
        """FieldError when there is none of this id."""
        return self._batches.get(id)

    def cancel(self, id: str) -> Batch:
        """Stop a batch; what it has answered is kept. FieldError when it has ended."""
        batch = self.get(id)
        if batch.status not in ("validating", "in_progress", "cancelling"):
            raise FieldError(f"the batch is {batch.status}: it cannot be cancelled any more", "batch_id")
        if batch.status != "cancelling":
            self._enter(batch, "cancelling")
            self._lives[id].cancel()
        return batch

    def check_unused(self, file_id: str) -> None:
        """FieldError when a batch still needs this file."""
        for batch in self.all():
            if batch.input_file_id == file_id and batch.status in UNFINISHED:
                raise FieldError(f"{batch.id} is answering this file: cancel it first", "file_id")

    # -- a batch's life --

    def _begin(self, batch: Batch) -> None:
        life = self._lives[batch.id] = asyncio.create_task(self._live(batch))
        life.add_done_callback(lambda _: self._lives.pop(batch.id, None))

    def _enter(self, batch: Batch, status: str) -> None:
        batch.status = status
        setattr(batch, f"{status}_at", int(time.time()))
        self._batches.put(batch.id, batch)

    async def _live(self, batch: Batch) -> None:
        try:
            try:
                if batch.status == "validating":
                    await self._validate(batch)
                if batch.status == "in_progress":
                    await asyncio.wait_for(self._answer(batch), max(batch.expires_at - time.time(), 0))
            except asyncio.TimeoutError:
                log.warning("%s has expired", batch.id)
            except asyncio.CancelledError:
                if batch.status != "cancelling":  # the server ends
                    raise
            if batch.status in UNFINISHED:
                await asyncio.to_thread(self._finalize, batch)
        except EngineDied:
            log.error("%s waits for a server whose engine runs", batch.id)
        except (MinisglError, OSError) as error:
            log.error("%s has failed: %s", batch.id, error)
            batch.errors = {
                "object": "list",
                "data": [{"code": "server_error", "message": "the server could not write its files"}],
            }
            with suppress(MinisglError):
                self._enter(batch, "failed")

    async def _validate(self, batch: Batch) -> None:
        path = self._files.path(batch.input_file_id)
        batch.request_counts.total, errors = await asyncio.to_thread(check_lines, path, batch.endpoint, self._model)
        if errors:
            batch.errors = {"object": "list", "data": errors}
        self._enter(batch, "failed" if errors else "in_progress")

    async def _answer(self, batch: Batch) -> None:
        """Answer every line that has no answer yet."""
        async with self._turn:
            journal = Journal(self._journal_path(batch))
            tasks: set[asyncio.Task[None]] = set()
            try:
                await asyncio.to_thread(journal.load)
                self._count(batch, journal)
                with self._files.path(batch.input_file_id).open("rb") as file:
                    for index, value in read_lines(file):
                        if not journal.key(index):
                            row = PARSER.parse(Record(index, f"line {index + 1}", value))
                            await self._wait_for_room(row, tasks)
                            tasks.add(self._start_row(batch, row, journal))
                while tasks:
                    await _reap(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                journal.close()

    async def _wait_for_room(self, row: Row | BadRow, tasks: set["asyncio.Task[None]"]) -> None:
        """Return when the row may run: when no more answers of batches run than half of what the engine runs at once,
        and than interactive requests leave; but one row always may."""
        num_answers = _num_answers(row)
        while True:
            ready, answering = self._answering.engine.ready, self._answering
            if ready and not answering.draining:
                room = min(ready.max_running // 2, ready.max_running - answering.num_admitted)
                if not self._num_running or self._num_running + num_answers <= room:
                    return
            if tasks:
                await _reap(tasks, POLL_S)
            else:
                await asyncio.sleep(POLL_S)

    def _start_row(self, batch: Batch, row: Row | BadRow, journal: Journal) -> "asyncio.Task[None]":
        num_answers = _num_answers(row)

        def leave(task: object) -> None:
            self._num_running -= num_answers

        self._num_running += num_answers
        task = asyncio.create_task(self._answer_row(batch, row, journal))
        task.add_done_callback(leave)
        return task

    async def _answer_row(self, batch: Batch, row: Row | BadRow, journal: Journal) -> None:
        outcome = row.error if isinstance(row, BadRow) else await self._rows.answer(row, batch.id)
        journal.append([format_line(row.head, outcome, spell=self._model.spell)])
        self._count(batch, journal)

    def _count(self, batch: Batch, journal: Journal) -> None:
        batch.request_counts.completed = journal.num_rows - journal.num_failed
        batch.request_counts.failed = journal.num_failed

    def _finalize(self, batch: Batch) -> None:
        """Make files of the journal. Done again after a crash, it makes the same ones."""
        if batch.status != "finalizing":
            batch.output_file_id, batch.error_file_id = self._files.new_id(), self._files.new_id()
            self._enter(batch, "finalizing")
        journal = Journal(self._journal_path(batch))
        usage = Usage()

        def answered() -> Iterator[bytes]:
            nonlocal usage
            for line in self._lines(batch, journal):
                if not line.failed:
                    usage = _added(usage, line)
                    yield line.data

        try:
            journal.load()
            self._count(batch, journal)
            counts = batch.request_counts
            end = "cancelled" if batch.cancelling_at else "completed"
            if end == "completed" and counts.completed + counts.failed < counts.total:
                end, counts.failed = "expired", counts.total - counts.completed
            failed = (line.data for line in self._lines(batch, journal, expired=end == "expired") if line.failed)
            batch.output_file_id = self._write(batch, batch.output_file_id, "output", answered())
            batch.error_file_id = self._write(batch, batch.error_file_id, "error", failed)
            batch.usage = usage_of_response(usage)
            self._enter(batch, end)
        finally:
            journal.close()
        self._journal_path(batch).unlink()

    def _write(self, batch: Batch, id: str | None, what: str, lines: Iterator[bytes]) -> str | None:
        """The id of a file of these lines; None when there are none."""
        after = (batch.output_expires_after or {}).get("seconds")
        file = self._files.create(f"{batch.id}_{what}.jsonl", "batch_output", lines, expires_after_s=after, id=id)
        if file.bytes:
            return id
        self._files.delete(file.id)
        return None

    def _lines(self, batch: Batch, journal: Journal, *, expired: bool = False) -> Iterator[Line]:
        """The answers in the order of the lines; with `expired`, also for lines that have none."""
        with self._files.path(batch.input_file_id).open("rb") as file:
            for index, value in read_lines(file):
                if journal.key(index):
                    line = parse_line(journal.read(index))
                    assert line is not None, "the journal has only whole lines"
                    yield line
                elif expired:
                    row = PARSER.parse(Record(index, f"line {index + 1}", value))
                    yield format_line(row.head, EXPIRED)

    def _journal_path(self, batch: Batch) -> Path:
        return self._batches.folder / f"{batch.id}.journal.jsonl"


async def _reap(tasks: set["asyncio.Task[None]"], timeout_s: float | None = None) -> None:
    """Wait until one ends, and take those out that have; raises what they raised."""
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    tasks -= done
    for task in done:
        task.result()


def _num_answers(row: Row | BadRow) -> int:
    return 0 if isinstance(row, BadRow) else row.n * row.head.num_prompts


def _added(usage: Usage, line: Line) -> Usage:
    own = json.loads(line.data)["response"]["body"]["usage"]
    return Usage(
        usage.prompt_tokens + own["prompt_tokens"],
        usage.completion_tokens + own["completion_tokens"],
        usage.cached_tokens + own["prompt_tokens_details"]["cached_tokens"],
    )
