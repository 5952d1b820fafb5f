"""What every run over rows keeps: counts, results on their way to the output, and an end where too many rows fail.

Knows rows and lines. How rows are answered is for those who inherit to say.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from minisgl.batch_run.answers import Line
from minisgl.batch_run.output import Output
from minisgl.batch_run.rows import Head, RowError
from minisgl.errors import MinisglError
from minisgl.request import Usage


@dataclass
class Summary:
    """What has been done so far. `cached_tokens` of the prompt tokens came from the prefix cache."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    stopped: bool = False
    started_s: float = field(default_factory=perf_counter)
    ended_s: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended_s or perf_counter()) - self.started_s

    @property
    def num_errors(self) -> int:
        return self.errors.total()


class RowRun:
    """One job. `summary` is right at any moment, also after an exception: it counts the rows that were written.
    `should_stop` is asked between pieces of work: True ends the run once what was begun has ended."""

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

    def write(self, lines: list[Line]) -> None:
        """MinisglError when more than `max_errors` rows have failed."""
        if not lines:
            return
        self.output.append(lines)
        self.summary.rows += len(lines)
        self.on_progress(self.summary)
        if self.max_errors is not None and self.summary.num_errors > self.max_errors:
            raise MinisglError(f"{self.summary.num_errors:,} rows failed, more than --max-errors {self.max_errors:,}")

    def count(self, prompt: Usage, output_tokens: int) -> None:
        """Tokens of a prompt, and tokens that came out."""
        self.summary.prompt_tokens += prompt.prompt_tokens
        self.summary.cached_tokens += prompt.cached_tokens
        self.summary.output_tokens += output_tokens

    def note(self, head: Head, error: RowError) -> None:
        """Count a row that failed."""
        self.summary.errors[error.type] += 1
        self.summary.first_error = self.summary.first_error or f"{head.place}: {error.message}"
