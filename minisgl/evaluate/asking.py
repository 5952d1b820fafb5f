"""One run over the rows of an evaluation: lines into the journal, as they are made.

Knows rows and lines. How rows are answered is for those who inherit to say.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from time import perf_counter

from minisgl.batch_run.answers import Line, format_line
from minisgl.batch_run.row_run import RowRun, Summary
from minisgl.batch_run.rows import BadRow, Head, Row, RowError

CONCURRENCY = 32  # requests to a server at a time


class AskingRun(RowRun, ABC):
    """Answers rows piece by piece."""

    def run(self, rows: Iterable[Row | BadRow]) -> Summary:
        """Answer every row. A row's own fault becomes its error row; any other exception ends the run."""
        for lines in self.answer(iter(rows)):
            self.write(lines)
        self.summary.ended_s = perf_counter()
        return self.summary

    @abstractmethod
    def answer(self, rows: Iterator[Row | BadRow]) -> Iterator[list[Line]]:
        """Lines as they are made; each row has one."""

    def fail(self, head: Head, error: RowError) -> Line:
        self.note(head, error)
        return format_line(head, error)
