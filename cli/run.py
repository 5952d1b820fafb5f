"""`minisgl run`: a file of prompts in, a file of answers out.

Parses flags, prints, sets the exit code. Everything about rows and files is in minisgl.batch_run.
"""

import os
import sys
from typing import Any

import click
from tqdm import tqdm

from minisgl.batch_run.reader import count_rows, open_input, read_rows
from minisgl.batch_run.runner import BatchRun, Summary
from minisgl.batch_run.writer import ResultWriter, default_output
from minisgl.cli.options import (
    ROWS_FAILED,
    OneLineErrors,
    describe,
    engine_options,
    interrupted,
    model_option,
    sampling_options,
)
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams

EXAMPLES = """\b
A row is one JSON object on a line, with exactly one of these prompts:
  {"prompt": "The capital of France is"}
  {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
  {"prompt_token_ids": [1, 2, 3]}
It may also have "id" (string or number; default: the line's index),
"metadata" (anything; not read) and sampling parameters by their OpenAI
names, which win over the flags:
  {"id": "a-7", "prompt": "Once", "temperature": 0.7, "max_tokens": 64, "stop": ["."]}

A row that cannot be answered gets a row with an error; the others go on. Results are written as rows
finish; "index" is the line that a row came from. A results file that exists is replaced when the
first new row is written.

Exit code: 0 every row is good, 1 some rows failed, 2 the job could not start or finish, 130 Ctrl-C.

\b
Examples:
  minisgl run prompts.jsonl
  minisgl run prompts.jsonl -o answers.jsonl -m path/to/model --max-tokens 256
  minisgl run prompts.jsonl --temperature 0 --limit 10
  echo '{"prompt": "Hello"}' | minisgl run - --chat
"""


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Answer a file of prompts.")
@click.argument("input", metavar="INPUT")
@click.option("-o", "--output", metavar="OUT", help="Results file, or - for stdout. [default: INPUT.results.jsonl]")
@model_option
@click.option("--limit", type=click.IntRange(1), help="Answer the first N rows only.", metavar="N")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="--chat makes each prompt a user message of the chat template; --no-chat refuses messages. "
    "[default: prompts as they are, messages through the template]",
)
@click.option("--return-token-ids", is_flag=True, help="Add the output's token ids to each result.")
@sampling_options
@engine_options
def run(
    input: str,
    output: str | None,
    model: str | None,
    limit: int | None,
    chat: bool | None,
    return_token_ids: bool,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer every row of INPUT, a file of JSON lines (- is stdin), and write one result row for each."""
    if model == "":
        raise MinisglError("-m is empty; name a model folder or a Hugging Face id, or leave -m out for the demo model")
    with open_input(input) as file:
        target = output or default_output(input)
        writer = ResultWriter(target, file)
        if model is None:
            click.echo("No model given: using the demo model that ships with minisgl (-m names another).", err=True)
        # By default OpenMP's threads spin while they wait. The demo job on 2 cores takes 0.7 s so, and 1.2 s with
        # sleeping threads; beside one other busy program 24 s and 1.8 s.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from minisgl.llm import LLM  # imports torch: only now

        with LLM(model, **engine) as llm:
            if chat and not llm.tokenizer.has_chat_template:
                raise MinisglError("--chat: the model has no chat template; leave the flag out or choose a chat model")
            rows = read_rows(file, SamplingParams(**sampling), limit)
            with _progress_bar(count_rows(input, limit)) as bar:
                job = BatchRun(
                    llm,
                    writer.write,
                    chat=chat,
                    return_token_ids=return_token_ids,
                    on_progress=lambda summary: _advance(bar, summary),
                )
                try:
                    job.run(rows)
                    writer.finish()
                except KeyboardInterrupt:
                    bar.close()
                    interrupted(f"Interrupted: {_written(writer)}")
                except Exception as error:
                    bar.close()
                    raise MinisglError(f"stopped: {describe(error)}; {_written(writer)}") from error
                finally:
                    writer.close()
    _report(job.summary, target)
    if job.summary.num_errors:
        sys.exit(ROWS_FAILED)


def _progress_bar(total: int | None) -> "tqdm[Any]":
    # A log file gets a line every 30 s in place of a moving bar.
    return tqdm(total=total, unit="row", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30)


def _advance(bar: "tqdm[Any]", summary: Summary) -> None:
    bar.set_postfix_str(f"{summary.output_tokens / summary.seconds:,.0f} tokens/s", refresh=False)
    bar.update(summary.rows - bar.n)


def _written(writer: ResultWriter) -> str:
    place = "stdout" if writer.target == "-" else writer.target
    return f"{writer.num_rows:,} finished rows are in {place}" if writer.num_rows else "no row was written"


def _report(summary: Summary, target: str) -> None:
    cached = summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
    lines = [
        f"rows     {summary.rows:,}, {summary.num_errors:,} with errors",
        f"tokens   {summary.prompt_tokens:,} prompt ({cached:.0%} from the cache), {summary.output_tokens:,} output",
        f"speed    {summary.output_tokens / summary.seconds:,.0f} output tokens/s, {summary.seconds:.1f} s",
        f"results  {'stdout' if target == '-' else target}",
    ]
    if not summary.rows:
        lines.append("The input has no rows.")
    if summary.num_errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.errors.most_common())
        lines.append(f"{summary.num_errors:,} of {summary.rows:,} rows failed: {kinds}. First: {summary.first_error}")
    click.echo("\n".join(lines), err=True)
