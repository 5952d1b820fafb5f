"""What a running job shows: a bar on a terminal, lines at intervals elsewhere, and the table at its end.

Knows a job's summary. Does not know how it came about.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from minisgl.batch_run.files import replaced
from minisgl.batch_run.job import Job
from minisgl.batch_run.row_run import Summary

PLAIN_EVERY_S = 10.0
MODES = ("auto", "bar", "plain", "none")


class Progress:
    """Shows each summary that it is given, in one of MODES, on stderr. `total`: rows of the input, if known; `done`:
    rows that earlier runs did. latest: what was shown last."""

    def __init__(self, mode: str, total: int | None, done: int):
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        self._mode, self._total, self._done = mode, total, done
        self._said_s = time.monotonic()
        self.latest = Summary()
        self._bar: tqdm[Any] | None = None
        if mode == "bar":
            self._bar = tqdm(total=total, initial=done, unit="row", file=sys.stderr, mininterval=0.1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is, so that other lines can follow."""
        if self._bar is not None:
            self._bar.close()

    def show(self, summary: Summary) -> None:
        self.latest = summary
        if self._bar is not None:
            self._bar.set_postfix_str(_rates(summary), refresh=False)
            self._bar.update(self._done + summary.rows - self._bar.n)
        elif self._mode == "plain" and time.monotonic() - self._said_s >= PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            rows = self._done + summary.rows
            rate = summary.rows / summary.seconds
            of = left = ""
            if self._total is not None:
                of = f" of {self._total:,}"
                left = f", {tqdm.format_interval(max(0, self._total - rows) / rate)} left"
            click.echo(f"{rows:,}{of} rows, {rate:,.1f} rows/s, {_rates(summary)}{left}", err=True)


def _rates(summary: Summary) -> str:
    speed = f"{summary.output_tokens / summary.seconds:,.0f} tokens/s"
    return f"{speed}, {_cached(summary):.0%} cached, {summary.num_errors:,} errors"


def _cached(summary: Summary) -> float:
    return summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0


def closing_table(job: Job, summary: Summary) -> str:
    """What was done, for a person."""
    before = f" ({job.num_done:,} of them before)" if job.num_done else ""
    lines = [f"rows     {job.output.num_rows:,}{before}, {job.output.num_failed:,} with errors"]
    if summary.rows:
        lines += [
            f"tokens   {summary.prompt_tokens:,} prompt ({_cached(summary):.0%} from the cache), "
            f"{summary.output_tokens:,} output",
            f"speed    {summary.output_tokens / summary.seconds:,.0f} output tokens/s, "
            f"{summary.rows / summary.seconds:,.1f} rows/s, {summary.seconds:.1f} s",
        ]
    lines.append(f"results  {job.output.target}")
    if not job.output.num_rows:
        lines.append("The input has no rows.")
    elif (missing := sorted(job.parser.missing_columns)) and not job.num_done:
        lines.append(f"No row has {', '.join(map(repr, missing))}, which --columns names.")
    if summary.num_errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.errors.most_common())
        lines.append(f"{summary.num_errors:,} of {summary.rows:,} rows failed: {kinds}. First: {summary.first_error}")
    return "\n".join(lines)


def write_report(path: Path, job: Job, summary: Summary, ended: str) -> None:
    """What was done, for a program: one JSON object. `ended` says how: complete, interrupted or stopped."""
    report = {
        "ended": ended,
        "output": job.output.target,
        "rows": job.output.num_rows,
        "rows_before": job.num_done,
        "rows_with_errors": job.output.num_failed,
        "errors": dict(summary.errors),
        "first_error": summary.first_error or None,
        "prompt_tokens": summary.prompt_tokens,
        "cached_tokens": summary.cached_tokens,
        "output_tokens": summary.output_tokens,
        "seconds": round(summary.seconds, 3),
        "rows_per_s": round(summary.rows / summary.seconds, 2),
        "output_tokens_per_s": round(summary.output_tokens / summary.seconds, 1),
        "settings": job.manifest.settings,
    }
    with replaced(path) as file:
        file.write(json.dumps(report, indent=2).encode() + b"\n")
