"""Drives an engine over a stream of rows: read ahead, tokenize, submit, step, write.

Knows rows and the engine's request interface. Does not know files, flags or how a step works. Memory is bounded by the
rows in flight: no more than `look_ahead` are read before one of them is answered, however long the input is.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from minisgl.batch_run.rows import BadRow, Row, RowError, RowId, format_answer, format_error, row_error
from minisgl.errors import MinisglError, RequestError
from minisgl.request import Result

if TYPE_CHECKING:
    from minisgl.llm import LLM

# Wide enough for the engine to find shared prefixes among the rows, small enough to read in well under a second.
MIN_LOOK_AHEAD = 4096
# Tokens of common vocabularies are shorter (Qwen's longest is 128 spaces). Tokenizing megabytes takes seconds, so a
# text that cannot fit the context is refused before.
MAX_CHARS_PER_TOKEN = 256


@dataclass
class Summary:
    """What has been done so far. `cached_tokens` of the prompt tokens came from the prefix cache."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended_s or time.perf_counter()) - self.started_s

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    def add_error(self, index: int, error: RowError) -> None:
        self.errors[error.type] += 1
        self.first_error = self.first_error or f"line {index + 1}: {error.message}"


class BatchRun:
    """One job. `summary` is right at any moment, also after an exception: it counts the rows that were written."""

    def __init__(
        self,
        llm: "LLM",
        write: Callable[[list[bytes]], None],
        *,
        chat: bool | None = None,
        return_token_ids: bool = False,
        look_ahead: int | None = None,
        on_progress: Callable[[Summary], None] = lambda summary: None,
    ):
        """`write` takes finished output lines. `chat` is the flag: True wraps prompts too, False refuses messages."""
        self.llm = llm
        self.write = write
        self.chat = chat
        self.return_token_ids = return_token_ids
        self.look_ahead = look_ahead or max(MIN_LOOK_AHEAD, 2 * llm.config.max_running)
        self.on_progress = on_progress
        self.summary = Summary()
        self._ids: dict[int, RowId] = {}  # of the requests in flight, by index

    def run(self, rows: Iterable[Row | BadRow]) -> Summary:
        """Answer every row. A row's own fault becomes its error row; any other exception ends the run."""
        self.summary = Summary()
        rows = iter(rows)
        more = True
        while more or self.llm.num_unfinished:
            room = self.look_ahead - self.llm.num_unfinished
            if more and room >= self.look_ahead // 2:
                window = list(islice(rows, room))
                more = len(window) == room
                self._admit(window)
            if self.llm.num_unfinished:
                self._finish([(request.index, result) for request, result in self.llm.step()])
        self.summary.ended_s = time.perf_counter()
        return self.summary

    def _admit(self, window: list[Row | BadRow]) -> None:
        """Submit the good rows of a window in one burst; write the others as error rows."""
        refused: list[tuple[Row | BadRow, RowError]] = [(row, row.error) for row in window if isinstance(row, BadRow)]
        requests = []
        for row, prompt in self._tokenize([row for row in window if isinstance(row, Row)]):
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                requests.append(self.llm.new_request(prompt, row.params, index=row.index))
                self._ids[row.index] = row.id
            except RequestError as refusal:
                refused.append((row, row_error(refusal.type, str(refusal))))
        self.llm.submit(requests)
        lines = []
        for bad, error in refused:
            lines.append(format_error(bad.index, bad.id, error, return_token_ids=self.return_token_ids))
            self.summary.add_error(bad.index, error)
        self._write(lines)

    def _tokenize(self, rows: list[Row]) -> list[tuple[Row, list[int] | RequestError]]:
        """Each row with its prompt's token ids, or with why it has none. All texts are encoded in one call."""
        tokenized: list[tuple[Row, list[int] | RequestError]] = []
        texts = []
        for row in rows:
            if row.prompt_token_ids is not None:
                tokenized.append((row, row.prompt_token_ids))
            elif refusal := self._refuse_text(row):
                tokenized.append((row, refusal))
            elif row.prompt is not None and not self.chat:
                texts.append((row, row.prompt))
            else:
                tokenized.append((row, self._apply_template(row)))
        encoded = self.llm.tokenizer.encode_batch([text for _, text in texts]) if texts else []
        return tokenized + [(row, ids) for (row, _), ids in zip(texts, encoded, strict=True)]

    def _refuse_text(self, row: Row) -> RequestError | None:
        """Why the row's text cannot become tokens, whatever it says."""
        try:
            _ = self.llm.tokenizer
        except MinisglError as error:
            return RequestError(str(error), "no_tokenizer")
        messages = row.messages or [{"content": row.prompt}]
        num_chars = sum(len(message["content"]) for message in messages)
        max_len = self.llm.config.max_len
        assert max_len is not None
        if num_chars <= MAX_CHARS_PER_TOKEN * max_len:
            return None
        message = f"the prompt has {num_chars:,} characters, which the context of {max_len:,} tokens cannot hold"
        return RequestError(f"{message}: shorten it", "prompt_too_long")

    def _apply_template(self, row: Row) -> list[int] | RequestError:
        if self.chat is False:
            return RequestError("messages need the chat template, and --no-chat turns it off", "invalid_messages")
        try:
            return self.llm.tokenizer.apply_chat_template(row.messages or [{"role": "user", "content": row.prompt}])
        except RequestError as error:
            return error

    def _finish(self, ended: list[tuple[int, Result]]) -> None:
        lines = []
        for index, result in ended:
            row_id = self._ids.pop(index)
            if result.error is None:
                lines.append(format_answer(index, row_id, result, return_token_ids=self.return_token_ids))
            else:
                error = row_error(result.error.type, str(result.error))
                lines.append(format_error(index, row_id, error, return_token_ids=self.return_token_ids, result=result))
                self.summary.add_error(index, error)
            self.summary.prompt_tokens += result.usage.prompt_tokens
            self.summary.output_tokens += result.usage.completion_tokens
            self.summary.cached_tokens += result.usage.cached_tokens
        self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            self.write(lines)
            self.summary.rows += len(lines)
            self.on_progress(self.summary)
