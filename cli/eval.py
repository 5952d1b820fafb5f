"""`minisgl eval`: a score for a model on a data set, and a test of two scores.

Parses flags, prints, sets the exit code. Everything about tasks and scores is in minisgl.evaluate.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from minisgl.batch_run.row_run import Summary
from minisgl.batch_run.sources import HUB, default_output
from minisgl.cli.compare import compare
from minisgl.cli.options import (
    ROWS_FAILED,
    OneLineErrors,
    engine_options,
    model_option,
    sampling_options,
    table_options,
    url_option,
)
from minisgl.cli.progress import MODES
from minisgl.cli.run import answer
from minisgl.cli.tables import results_table
from minisgl.errors import MinisglError
from minisgl.evaluate.asking import CONCURRENCY
from minisgl.evaluate.results import SAMPLES
from minisgl.evaluate.task import YAML_SUFFIXES, Task, load_task, presets, task_for

EXAMPLES = """\b
WHAT is the name of a task, a YAML file of one, or data as `minisgl run` takes
it: a file (.jsonl .json .csv .parquet .txt), a folder, hf:ORG/NAME[:CONFIG].
Data behind a task is asked in place of the task's own. Flags win over tasks.

\b
Tasks that come with minisgl:
  {presets}

\b
A YAML file has the flags' names as keys, and data, sampling and separator:
  data: hf:openai/gsm8k:main
  split: test
  template: "Question: {{{{ question }}}}\\nAnswer:"
  target: answer.split('####')[1]
  extract: number
  match: number
  sampling: {{max_tokens: 512}}

Results go to a folder: answers.jsonl (what the model said; the same command goes on from it), samples.jsonl (prompt,
output, extracted answer, target, verdict) and results.json. Another way to extract or to compare asks no model again.
Rows that cannot be scored count as wrong and are shown.

Exit code: 0 every row was scored, 1 some rows have errors, 2 it could not start or finish, 130 Ctrl-C, 143 SIGTERM.

\b
Examples:
  minisgl eval demo
  minisgl eval gsm8k -m path/to/model --limit 200
  minisgl eval hf:openai/gsm8k:main --split test -m path/to/model
  minisgl eval sums.jsonl --prompt-column question --target answer --extract number --match number
  minisgl eval mmlu -m path/to/model --few-shot 0 -o mmlu-0
  minisgl eval gsm8k --url http://127.0.0.1:30000 --concurrency 64
  minisgl eval --harness arc_easy,piqa -m path/to/model
  minisgl eval compare mmlu mmlu-0
"""


HARNESS_SETTINGS = ("model", "engine", "limit", "few_shot", "chat", "system")  # that its tasks leave open


class _Eval(OneLineErrors):
    """`minisgl eval WHAT...`, and `minisgl eval compare A B`, a command of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["compare"]:
            return compare.make_context(f"{info_name} compare", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def _task_options(command: Any) -> Any:
    return table_options(command, Task, "settings")


@click.command(
    "eval",
    cls=_Eval,
    epilog=EXAMPLES.format(presets="\n  ".join(presets())),
    short_help="Score a model on a data set, or compare two scores.",
)
@click.argument("what", metavar="WHAT...", nargs=-1)
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), help="[default: WHAT.eval]")
@model_option
@url_option
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help=f"Of --url: most requests at a time. [default: {CONCURRENCY}]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Ask the first N rows only.")
@click.option("--allow-code", is_flag=True, help="Run programs that the model wrote, in subprocesses with limits.")
@click.option("--fresh", is_flag=True, help="Start anew; results of an earlier run go when the first row is done.")
@click.option("--retry-errors", is_flag=True, help="Ask again the rows that failed in an earlier run.")
@click.option("--max-errors", type=click.IntRange(0), metavar="N", help="Stop when more rows have failed in this run.")
@click.option("--progress", type=click.Choice(MODES), default="auto", help="[default: bar on a terminal, else plain]")
@click.option("--harness", metavar="TASKS", help="Run these tasks of lm-evaluation-harness (extra `eval`) instead.")
@click.option("--include-path", metavar="FOLDER", help="Of --harness: more task files.")
@_task_options
@sampling_options
@engine_options
def evaluate(
    what: tuple[str, ...],
    output: Path | None,
    allow_code: bool,
    progress: str,
    harness: str | None,
    include_path: str | None,
    settings: dict[str, Any],
    **options: Any,
) -> None:
    """Score a model on WHAT, and keep the rows behind the number."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `minisgl run`
    if harness is not None:
        folder = output or Path("harness.eval")
        results = _harness(
            harness, folder, include_path, {"WHAT": what, "allow_code": allow_code, **settings, **options}
        )
    else:
        from minisgl.evaluate.evaluation import Evaluation

        task, inputs = resolve(what, settings)
        folder = output or Path(default_folder(what))
        with Evaluation(task, inputs, folder, **options) as evaluation:
            summary = answer(evaluation, progress) if evaluation.has_rows_left else Summary()
            evaluation.finish()
            results = evaluation.grade(summary, allow_code=allow_code)
    click.echo(results_table(results))
    click.echo(f"samples  {folder / SAMPLES}", err=True)
    if results["rows_with_errors"]:
        sys.exit(ROWS_FAILED)


def _harness(tasks: str, folder: Path, include_path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness; what they decide themselves must not have been given."""
    if given["url"]:
        raise MinisglError("--harness needs the model here: name it with -m, or use lm-eval's own `local-completions`")
    sampling = given.pop("sampling")
    for name, value in {**given, **sampling}.items():
        if value and name not in HARNESS_SETTINGS:
            flag = name if name.isupper() else "--" + name.replace("_", "-")
            raise MinisglError(f"--harness: its tasks decide on that themselves: leave {flag} out")
    from minisgl.evaluate.harness_tasks import run_tasks

    known = {name: given[name] for name in HARNESS_SETTINGS if name in given}
    return run_tasks(tasks.split(","), folder, include_path=include_path, **known)


def resolve(what: Sequence[str], settings: dict[str, Any]) -> tuple[Task, list[str]]:
    """The task with `settings` over it, and the inputs that it asks."""
    if not what:
        raise MinisglError(f"name a task, a YAML file or data; the tasks are: {', '.join(presets())}")
    name, *inputs = what
    if name in presets() or name.endswith(YAML_SUFFIXES):
        task = load_task(name)
        if not inputs and task.data is None:
            raise MinisglError(f"{name} names no data: add it as `data`, or name it behind the task")
        return replace(task, **settings), inputs or [str(task.data)]
    if len(what) == 1 and not name.startswith(HUB) and not any(mark in name for mark in "./*?[") and not _exists(name):
        raise MinisglError(f"there is no task and no file {name!r}; the tasks are: {', '.join(presets())}")
    known = task_for(name) if len(what) == 1 else None
    if known:
        click.echo(f"Using the task {known.name}, which is for this data.", err=True)
    return replace(known or Task(name=Path(default_folder(what)).stem), **settings), list(what)


def default_folder(what: Sequence[str]) -> str:
    """demo -> demo.eval in this folder; data.jsonl -> data.eval beside it."""
    if what[0] in presets():
        return f"{what[0]}.eval"
    if what[0].endswith(YAML_SUFFIXES):
        return str(Path(what[0]).with_suffix(".eval"))
    return default_output(what).removesuffix(".results.jsonl") + ".eval"


def _exists(name: str) -> bool:
    return name == "-" or Path(name).exists()
