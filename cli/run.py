"""`minisgl run`: a file of prompts in, a file of answers out.

Parses flags, prints, sets the exit code. Everything about rows and files is in minisgl.batch_run.
"""

import os
import sys
from pathlib import Path
from typing import Any, get_args

import click

from minisgl.batch_run.job import Job, JobOptions
from minisgl.batch_run.prompts import OnLong
from minisgl.batch_run.row_run import Summary
from minisgl.batch_run.rows import MAX_SAMPLES
from minisgl.cli.options import (
    ROWS_FAILED,
    JsonObject,
    OneLineErrors,
    describe,
    engine_options,
    model_option,
    sampling_options,
)
from minisgl.cli.progress import MODES, Progress, closing_table, write_report
from minisgl.cli.stopping import StopSignals
from minisgl.errors import MinisglError
from minisgl.processes import started

EXAMPLES = """\b
INPUT is a file (.jsonl .json .csv .parquet .txt, also .gz .zst), several of
them, a quoted glob, a folder, hf:ORG/NAME[:CONFIG], a folder that `datasets`
saved, or - for JSON lines from stdin.

\b
A row of JSON has exactly one of these prompts:
  {"prompt": "The capital of France is"}
  {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
  {"prompt_token_ids": [1, 2, 3]}
It may also have "id" (string or number; default: the row's index), "n" and
sampling parameters by their OpenAI names, which win over the flags; beside
messages also tools, tool_choice and chat_template_kwargs:
  {"id": "a-7", "prompt": "Once", "temperature": 0.7, "max_tokens": 64, "stop": ["."]}
Other keys are carried over to the output. Lines of OpenAI's Batch API are
answered in its format.

A row that cannot be answered gets a row with an error; the others go on. Results are written as rows finish; "index" is
the row that a result came from. Running the same command again goes on where the last run ended, however it ended.

Exit code: 0 every row is good, 1 some rows failed, 2 the job could not start or finish, 130 Ctrl-C, 143 SIGTERM.

\b
Examples:
  minisgl run prompts.jsonl
  minisgl run prompts.jsonl -o answers.jsonl -m path/to/model --max-tokens 256
  minisgl run reviews.csv --template 'Summarise: {{ text }}' -o summaries.parquet
  minisgl run prompts.jsonl --temperature 0 --limit 10
  minisgl run reviews.csv --prompt-column text --chat --choice good --choice bad
  echo '{"prompt": "Hello"}' | minisgl run - --chat
"""


def _shard(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    number, _, of = value.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, such as 1/4")
    return int(number), int(of)


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Answer a file of prompts.")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Results: a .jsonl, .csv or .parquet file, or - for stdout. [default: INPUT.results.jsonl]",
)
@model_option
@click.option("--split", metavar="NAME", help="Split of a data set. [default: the only one]")
@click.option("--prompt-column", metavar="NAME", help="The column that is the prompt; no column is a parameter then.")
@click.option(
    "--template",
    metavar="TEXT|FILE",
    help="A Jinja template that makes the prompt from a row's columns; no column is a parameter then.",
)
@click.option("--system", metavar="TEXT", help="A system message for rows that have none; makes prompts user messages.")
@click.option("--columns", metavar="A,B", callback=_names, help="Columns to carry over. [default: all others]")
@click.option("--limit", type=click.IntRange(1, sys.maxsize), help="Answer the first N rows only.", metavar="N")
@click.option(
    "--shard", metavar="I/N", default="1/1", callback=_shard, help="Answer the I-th of N parts, for `minisgl merge`."
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="--chat makes each prompt a user message of the chat template; --no-chat refuses messages. "
    "[default: prompts as they are, messages through the template]",
)
@click.option(
    "--chat-template-kwargs",
    type=JsonObject(),
    metavar="JSON",
    help="Arguments of the chat template for rows that have none, such as '{\"enable_thinking\": false}'.",
)
@click.option("--n", type=click.IntRange(1, MAX_SAMPLES), default=1, help="Samples of each row. [default: 1]")
@click.option("--dedup", is_flag=True, help="Answer rows that ask the same once, and give all of them that answer.")
@click.option(
    "--on-long",
    type=click.Choice(get_args(OnLong)),
    default="error",
    help="Prompts that do not fit the context: refuse, or drop their start or their end. [default: error]",
)
@click.option("--return-token-ids", is_flag=True, help="Add the output's token ids to each result.")
@click.option("--ordered", is_flag=True, help="Write the results in the order of the input, when all are there.")
@click.option("--fresh", is_flag=True, help="Start anew; results of an earlier run go when the first row is done.")
@click.option("--retry-errors", is_flag=True, help="Answer again the rows that failed in an earlier run.")
@click.option("--max-errors", type=click.IntRange(0), metavar="N", help="Stop when more rows have failed in this run.")
@click.option(
    "--max-inflight",
    type=click.IntRange(4),
    metavar="N",
    help="Most rows in memory; prefixes are shared within a quarter of them. [default: 8192, or 4 x --max-running]",
)
@click.option("--progress", type=click.Choice(MODES), default="auto", help="[default: bar on a terminal, else plain]")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the closing figures as JSON.")
@click.option("--dry-run", is_flag=True, help="Count rows and tokens, estimate time and memory, and answer nothing.")
@sampling_options
@engine_options
def run(progress: str, report: Path | None, dry_run: bool, **options: Any) -> None:
    """Answer every row of the INPUTs and write one result row for each."""
    if options["model"] == "":
        raise MinisglError("-m is empty; name a model folder or a Hugging Face id, or leave -m out for the demo model")
    # By default OpenMP's threads spin while they wait. The demo job on 2 cores takes 0.7 s so, and 1.2 s with
    # sleeping threads; beside one other busy program 24 s and 1.8 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    asked = JobOptions(**options)
    if dry_run:
        from minisgl.batch_run.estimate import estimate

        click.echo(estimate(asked))
        return
    with Job(asked) as job:
        if report:
            job.check_report(report)
        summary = answer(job, progress, report) if job.has_rows_left else Summary()
        job.finish()
    click.echo(closing_table(job, summary), err=True)
    if report:
        write_report(report, job, summary, "complete")
    if job.output.num_failed:
        sys.exit(ROWS_FAILED)


def answer(job: Job, progress: str, report: Path | None = None) -> Summary:
    """Answer the rows that are left; when that does not come to its end, say how far it came and exit."""
    if job.options.model is None:
        click.echo("No model given: using the demo model that ships with minisgl (-m names another).", err=True)
    with (
        job.load() as llm,
        started(),
        StopSignals() as signals,
        Progress(progress, job.count(), job.num_done) as shown,
    ):

        def should_stop() -> bool:
            if signals.signum:
                shown.close()
                click.echo("Finishing the rows that run; the same signal again stops at once.", err=True)
            return bool(signals.signum)

        failure: Exception | None = None
        try:
            summary = job.answer(llm, should_stop=should_stop, on_progress=shown.show)
            if not summary.stopped:
                return summary
        except KeyboardInterrupt:
            pass  # the exit below
        except Exception as error:
            failure = error
        shown.close()
        if report:
            write_report(report, job, shown.latest, "stopped" if failure else "interrupted")
        if failure:
            raise MinisglError(f"stopped: {describe(failure)}; {_written(job)}") from failure
        click.echo(f"Interrupted: {_written(job)}", err=True)
        sys.exit(signals.exit_code)


def _written(job: Job) -> str:
    num_rows = job.output.num_rows - job.num_done
    rows = f"{num_rows:,} finished rows are in {job.output.place}" if num_rows else "no row was written"
    return f"{rows}; the same command goes on from there" if job.output.can_go_on else rows
