"""Drives an engine over a stream of rows: take a burst, submit, step, write.

Knows rows and the engine's request interface. Does not know files, flags or how a step works. Memory is bounded by the
rows in flight: of no more than `max_inflight` is anything held, however long the input is.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minisgl.batch_run.answers import Line, format_line, relabel
from minisgl.batch_run.feeder import Feeder
from minisgl.batch_run.output import Output
from minisgl.batch_run.prompts import Leaders, OnLong, Prepared, PromptMaker
from minisgl.batch_run.row_run import RowRun, Summary
from minisgl.batch_run.rows import BadRow, Head, Row, RowError
from minisgl.chat import ChatPrompt
from minisgl.errors import MinisglError
from minisgl.request import CHOICE_STRIDE, Request, Result, Usage

if TYPE_CHECKING:
    from minisgl.llm import LLM

# A quarter of it, the burst that is ordered at once, is wide enough to find shared prefixes among the rows.
MIN_INFLIGHT = 8192


@dataclass
class Pending:
    """A row in flight: its samples that ended, prompt by prompt; the number that did not; and rows that wait for the
    same answer. chat: the prompt of a conversation."""

    head: Head
    results: list[Result | None]
    num_missing: int
    chat: ChatPrompt | None = None
    followers: list[Head] = field(default_factory=list)


class BatchRun(RowRun):
    """Answers rows with an engine that is here."""

    def __init__(
        self,
        llm: "LLM",
        output: Output,
        *,
        on_long: OnLong = "error",
        leaders: Leaders | None = None,
        return_token_ids: bool = False,
        max_inflight: int | None = None,
        n: int = 1,
        **watching: Any,
    ):
        """`leaders` (with --dedup) has the rows of earlier runs. `n`: samples of most rows, each of which is in flight
        by itself. `watching`: as in `RowRun`; it is asked to stop before each step."""
        super().__init__(output, **watching)
        self.llm = llm
        self.maker = PromptMaker(llm, on_long=on_long, leaders=leaders)
        self.return_token_ids = return_token_ids
        # Four bursts are in flight at most: one being made, one ready, and two in the engine, which gets the next when
        # a burst's worth is left.
        self.burst = max(1, (max_inflight or max(MIN_INFLIGHT, 4 * llm.config.max_running * llm.config.dp)) // (4 * n))
        self._pending: dict[int, Pending] = {}  # by row index
        self._num_following = 0
        self._spellings: dict[int, str] = {}  # of the vocabulary, at most

    def run(self, rows: Iterable[Row | BadRow]) -> Summary:
        """Answer every row. A row's own fault becomes its error row; any other exception ends the run, that of an input
        which cannot be read on once the rows before it are answered."""
        self.summary = Summary()
        feeder = Feeder(iter(rows), self.maker.prepare, self.burst)
        unreadable: MinisglError | None = None
        try:
            while self._pending or not feeder.exhausted:
                if self.should_stop():
                    self._drop_waiting()
                    break
                if len(self._pending) + self._num_following <= self.burst:
                    try:
                        burst = feeder.take(wait=not self._pending)
                    except MinisglError as error:
                        burst, unreadable = [], error
                    self._admit(burst)
                self._step()
            while self._pending:
                self._step()
            if unreadable:
                raise unreadable
        finally:
            feeder.close()
        self.summary.ended_s = time.perf_counter()
        return self.summary

    def _drop_waiting(self) -> None:
        """Take back what has not started; the next run will do it."""
        self.summary.stopped = True
        for request in self.llm.drop_waiting():
            self._pending.pop(request.index % CHOICE_STRIDE, None)

    def _admit(self, burst: list[Prepared]) -> None:
        """Submit a burst at once; write its bad rows."""
        lines: list[Line] = []
        requests: list[Request] = []
        for prepared in burst:
            if prepared.error:
                lines.append(self._fail(prepared.head, prepared.error))
            elif prepared.leader is None:
                count = len(prepared.requests)
                self._pending[prepared.head.index] = Pending(prepared.head, [None] * count, count, prepared.chat)
                requests += prepared.requests
            elif prepared.leader in self._pending:
                self._pending[prepared.leader].followers.append(prepared.head)
                self._num_following += 1
            else:
                self.write(lines)  # the leader may be among them
                lines = [self._repeat(prepared.head, prepared.leader)]
        if requests:
            self.llm.submit(requests)
        self.write(lines)

    def _step(self) -> None:
        if self.llm.num_unfinished:
            lines: list[Line] = []
            for request, result in self.llm.step():
                lines += self._end(request, result)
            self.write(lines)

    def _end(self, request: Request, result: Result) -> list[Line]:
        """The lines that are due when a sample has ended: none while others of its row run."""
        sample, index = divmod(request.index, CHOICE_STRIDE)
        pending = self._pending.get(index)
        if pending is None:  # the row was given up, with samples that had not started
            return []
        is_first = sample % (len(pending.results) // pending.head.num_prompts) == 0  # of its prompt's samples
        self.count(result.usage if is_first else Usage(), result.usage.completion_tokens)
        pending.results[sample] = self.llm.read_answer(result, pending.chat) if pending.chat else result
        pending.num_missing -= 1
        if pending.num_missing:
            return []
        del self._pending[index]
        self._num_following -= len(pending.followers)
        results = [result for result in pending.results if result]
        lines = []
        for head in (pending.head, *pending.followers):
            lines.append(format_line(head, results, return_token_ids=self.return_token_ids, spell=self._spell))
            failed = next((result.error for result in results if result.error), None)
            if failed:
                self.note(head, RowError(failed.type, str(failed)))
        return lines

    def _spell(self, token_id: int) -> str:
        """A token's text, special or not."""
        if token_id not in self._spellings:
            self._spellings[token_id] = self.llm.tokenizer.decode([token_id], False)
        return self._spellings[token_id]

    def _fail(self, head: Head, error: RowError) -> Line:
        self.note(head, error)
        return format_line(head, error, return_token_ids=self.return_token_ids)

    def _repeat(self, head: Head, leader: int) -> Line:
        line = relabel(self.output.read(leader), head)
        if line.failed:
            self.note(head, RowError("repeated", "it asks the same as an earlier row that failed"))
        return line
