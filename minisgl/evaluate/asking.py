"""One run over the rows of an evaluation: lines into the journal, counts, and an end where too many rows fail.

Knows rows and lines. How rows are answered is for those who inherit to say.
"""

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

from minisgl.batch_run.answers import Line, format_line
from minisgl.batch_run.output import Output
from minisgl.batch_run.rows import BadRow, Head, Row, RowError
from minisgl.batch_run.runner import Summary
from minisgl.errors import MinisglError
from minisgl.request import Usage

CONCURRENCY = 32  # requests to a server at a time


class AskingRun:
    """One job. `summary` is right at any moment. `should_stop` is asked between rows: True ends the run once what was
    asked is answered."""

    def __init__(
        self,
        output: Output,
        *,
        max_errors: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Summary], None] = lambda summary: None,
    ):
        self.output, self.max_errors = output, max_errors
        self.should_stop, self.on_progress = should_stop, on_progress
        self.summary = Summary()

    def run(self, rows: Iterable[Row | BadRow]) -> Summary:
        """Answer every row. A row's own fault becomes its error row; any other exception ends the run."""
        for lines in self.answer(iter(rows)):
            self.output.append(lines)
            self.summary.rows += len(lines)
            self.on_progress(self.summary)
            if self.max_errors is not None and self.summary.num_errors > self.max_errors:
                raise MinisglError(
                    f"{self.summary.num_errors:,} rows failed, more than --max-errors {self.max_errors:,}"
                )
        self.summary.ended_s = perf_counter()
        return self.summary

    def answer(self, rows: Iterator[Row | BadRow]) -> Iterator[list[Line]]:
        """Lines as they are made; each row has one."""
        raise NotImplementedError

    def count(self, usage: Usage, output_tokens: int) -> None:
        self.summary.prompt_tokens += usage.prompt_tokens
        self.summary.cached_tokens += usage.cached_tokens
        self.summary.output_tokens += output_tokens

    def fail(self, head: Head, error: RowError) -> Line:
        self.summary.errors[error.type] += 1
        self.summary.first_error = self.summary.first_error or f"{head.place}: {error.message}"
        return format_line(head, error)
