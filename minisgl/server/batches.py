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

from minisgl.batch_run.answers import Line, format_line, parse_line
from minisgl.batch_run.formats import read_lines
from minisgl.batch_run.journal import Journal
from minisgl.batch_run.rows import BadRow, Head, Record, Row, RowError
from minisgl.errors import MinisglError
from minisgl.openai.errors import FieldError
from minisgl.openai.responses import usage_of_response
from minisgl.request import Result, Usage
from minisgl.server.answering import Answering
from minisgl.server.batch_rows import PARSER, RowAnswers, check_lines
from minisgl.server.engine_client import EngineDied
from minisgl.server.files import FileStore
from minisgl.server.records import Batch, Catalogue
from minisgl.server.served import ServedModel

log = logging.getLogger("minisgl.server")

WINDOW_S = 24 * 3600  # OpenAI's only completion_window
POLL_S = 0.1  # for room that interactive requests leave
EXPIRED = RowError("batch_expired", "the line was not answered before the completion window ended")
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


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
            else:
                self._clean_up(batch)

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
        source, now = self._files.path(self._files.get(input_file_id).id), int(time.time())
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
        self._input(batch).hardlink_to(source)  # whatever becomes of the file
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
            if life := self._lives.get(id):
                life.cancel()
            else:  # it waited for an engine
                self._begin(batch)
        return batch

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
            with suppress(MinisglError):
                self._fail(batch, [{"code": "server_error", "message": "the server could not write its files"}])

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        batch.errors = {"object": "list", "data": errors}
        self._enter(batch, "failed")
        self._clean_up(batch)

    async def _validate(self, batch: Batch) -> None:
        work = asyncio.to_thread(check_lines, self._input(batch), batch.endpoint, self._model)
        batch.request_counts.total, errors = await work
        if errors:
            self._fail(batch, errors)
        else:
            self._enter(batch, "in_progress")

    async def _answer(self, batch: Batch) -> None:
        """Answer every line that has no answer yet."""
        async with self._turn:
            journal = Journal(self._journal(batch))
            tasks: set[asyncio.Task[None]] = set()
            try:
                await asyncio.to_thread(journal.load)
                self._count(batch, journal)
                with self._input(batch).open("rb") as file:
                    for index, value in read_lines(file):
                        if journal.key(index):
                            continue
                        row = PARSER.parse(Record(index, f"line {index + 1}", value))
                        if isinstance(row, BadRow):
                            self._write_answer(batch, journal, row.head, row.error)
                            await asyncio.sleep(0)  # others' turn, however many are bad
                        else:
                            await self._wait_for_room(row, tasks)
                            tasks.add(self._start_row(batch, row, journal))
                while tasks:
                    await _reap(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                journal.close()

    async def _wait_for_room(self, row: Row, tasks: set["asyncio.Task[None]"]) -> None:
        """Return when the row may run: when no more answers of batches run than half of what the engine runs at once,
        and than interactive requests leave; but one row always may."""
        while True:
            ready, answering = self._answering.engine.ready, self._answering
            if ready and not answering.draining:
                room = min(ready.max_running // 2, ready.max_running - answering.num_admitted)
                if not self._num_running or self._num_running + row.num_answers <= room:
                    return
            if tasks:
                await _reap(tasks, POLL_S)
            else:
                await asyncio.sleep(POLL_S)

    def _start_row(self, batch: Batch, row: Row, journal: Journal) -> "asyncio.Task[None]":
        async def answer() -> None:
            self._write_answer(batch, journal, row.head, await self._rows.answer(row, batch.id))

        def leave(task: object) -> None:
            self._num_running -= row.num_answers

        self._num_running += row.num_answers
        task = asyncio.create_task(answer())
        task.add_done_callback(leave)
        return task

    def _write_answer(self, batch: Batch, journal: Journal, head: Head, outcome: list[Result] | RowError) -> None:
        journal.append([format_line(head, outcome, spell=self._model.spell)])
        self._count(batch, journal)

    def _count(self, batch: Batch, journal: Journal) -> None:
        batch.request_counts.completed = journal.num_rows - journal.num_failed
        batch.request_counts.failed = journal.num_failed

    def _finalize(self, batch: Batch) -> None:
        """Make files of the journal. Done again after a crash, it makes the same ones."""
        if batch.status != "finalizing":
            batch.output_file_id, batch.error_file_id = self._files.new_id(), self._files.new_id()
            self._enter(batch, "finalizing")
        journal = Journal(self._journal(batch))
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
        self._clean_up(batch)

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
        with self._input(batch).open("rb") as file:
            for index, value in read_lines(file):
                if journal.key(index):
                    line = parse_line(journal.read(index))
                    assert line is not None, "the journal has only whole lines"
                    yield line
                elif expired:
                    row = PARSER.parse(Record(index, f"line {index + 1}", value))
                    yield format_line(row.head, EXPIRED)

    def _input(self, batch: Batch) -> Path:
        return self._batches.folder / f"{batch.id}.input"

    def _journal(self, batch: Batch) -> Path:
        return self._batches.folder / f"{batch.id}.journal"

    def _clean_up(self, batch: Batch) -> None:
        """Remove what only a batch that runs needs."""
        for path in (self._input(batch), self._journal(batch)):
            path.unlink(missing_ok=True)


async def _reap(tasks: set["asyncio.Task[None]"], timeout_s: float | None = None) -> None:
    """Wait until one ends, and take those out that have; raises what they raised."""
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    tasks -= done
    for task in done:
        task.result()


def _added(usage: Usage, line: Line) -> Usage:
    own = json.loads(line.data)["response"]["body"]["usage"]
    return Usage(
        usage.prompt_tokens + own["prompt_tokens"],
        usage.completion_tokens + own["completion_tokens"],
        usage.cached_tokens + own["prompt_tokens_details"]["cached_tokens"],
    )
