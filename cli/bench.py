"""`minisgl bench`: flags for the measurements in minisgl.bench, which do the work."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from minisgl.cli.bench_options import (
    baseline_option,
    file_option,
    json_option,
    model_option,
    repeats_option,
    run_options,
    workload_option,
)
from minisgl.cli.bench_serve import serve
from minisgl.cli.options import OneLineErrors, engine_flag, engine_options

Row = dict[str, Any]

EXAMPLES = """\b
Examples:
  minisgl bench throughput --workload mini
  minisgl bench latency --batch 8
  minisgl bench start
  minisgl bench features
  minisgl bench kernels rms_norm attention_decode
  minisgl bench serve --request-rate 8
  minisgl bench batch_run
  minisgl bench report
"""
THROUGHPUT_EXAMPLES = """\b
Workloads:
  mini           256 requests, 100..1024 tokens in and out, uniform
  single         1 request, 128 in, 512 out
  prefill        64 requests, 2048 in, 1 out
  shared_prefix  8 groups of 64 requests, 2048 tokens shared and 128 own in, 128 out
  INxOUT         256 requests, so many tokens in and out: 512x128; of another number: 512x128x1000
  FILE           prompts as `minisgl run` takes them; a row's max_tokens (else 128) is its output
Tokens are sampled at temperature 0.6 and go on past the end of text, so that every engine does the same work.

\b
Figures:
  seconds          from handing over all prompts to the last result
  output tokens/s  output tokens / seconds
  input tokens/s   prompt tokens / seconds, cached ones too
  ready_s          seconds to make the engine, before any run; `minisgl bench start` has the whole of a start
Each is the median of the repeats, with the smallest and the largest.

\b
Examples:
  minisgl bench throughput --workload mini
  minisgl bench throughput --workload prompts.jsonl -m path/to/model --baseline transformers
  minisgl bench throughput --workload shared_prefix --repeats 5 --json rows.jsonl --profile trace
"""
LATENCY_EXAMPLES = """\b
Figures, in ms, p50 p90 p99 over the requests (ITL: the gaps) of all repeats:
  TTFT  time to first token = when the host has it - hand-over of the batch
  ITL   inter-token latency = a token's time - that of the one before it
  E2E   end to end = the last token's time - hand-over
The spread is that of the repeats' own p50.

\b
Examples:
  minisgl bench latency
  minisgl bench latency --batch 32 --input-len 1024 --output-len 256 --json rows.jsonl
"""
START_EXAMPLES = """\b
Figures, in seconds from before the process, medians of the starts with the smallest and the largest:
  ready_s   the engine is there
  answer_s  it has answered a first request
  compiled  kernels that were compiled, and not found in Triton's cache
Cold: what Triton compiles has an empty folder. Warm: the same folder once more.

\b
Examples:
  minisgl bench start
  minisgl bench start -m qwen3-8b --repeats 5 --json rows.jsonl
"""
FEATURES_EXAMPLES = """\b
Figures, of requests that decode together:
  tokens/s           output tokens / seconds, both from when the host has a token of every request
  cost               tokens/s of plain requests / tokens/s of these - 1, in percent; the median over the repeats, and
                     the smallest and the largest; the runs of a repeat take turns
  launches a step    kernels and copies that the profiler sees in a decode step (on a CPU: operators)
  plain, before ...  plain requests, while none had asked for more: what they cost and launch later must be the same
  N at once          N tokens that a grammar forces, computed in one step, against one by one: pays where it is negative

\b
Examples:
  minisgl bench features
  minisgl bench features -m qwen3-8b --batch 64 --repeats 7 --json rows.jsonl
"""
BATCH_RUN_EXAMPLES = """\b
Figures:
  journal   rows that are appended and fsynced in a second, in the folder for temporary files
  generate  seconds of LLM.generate on the workload's prompts
  job       seconds of `minisgl run` on the same engine, from the file of prompts to durable results
  overhead  median of job / median of generate - 1

\b
Examples:
  minisgl bench batch_run
  minisgl bench batch_run -m minisgl/demo/model --workload examples/prompts.jsonl --json rows.jsonl
"""
EVAL_EXAMPLES = """\b
Figures:
  rows/s    rows / seconds, of a run from the file of rows to durable results (lm-eval: of the scoring alone)
  tokens    of all prompts with their options, and the share that the prefix cache had
  accuracy  of random weights about a quarter; a sign that both do the same

\b
Examples:
  minisgl bench eval --baseline lm-eval
  minisgl bench eval -m minisgl/demo/model --rows 16 --context 40 --repeats 1 --json rows.jsonl
"""
PERPLEXITY_EXAMPLES = """\b
Figures, each beyond what the engine holds when it has read the text once:
  read      most bytes while the text is read without scores
  scored    most bytes while each of its tokens is scored
  tokens/s  tokens / seconds of that

\b
Examples:
  minisgl bench perplexity
  minisgl bench perplexity --layers 2 --device cpu --max-step-tokens 1024 --json rows.jsonl
"""
KERNELS_EXAMPLES = """\b
Figures:
  us           median of launches, each after the L2 cache was emptied; the host's share of a launch is in it
  graph us     median inside a CUDA graph of many launches, as decode runs; what fits stays in the L2 cache
  GB/s         bytes that the op cannot avoid / us
  TFLOP/s      floating-point operations that it cannot avoid / us
  of ceiling   the larger of GB/s / this device's copy rate and TFLOP/s / its bf16 matmul rate, both measured first
  baselines    the same work by others, and how many times longer than us

\b
Examples:
  minisgl bench kernels
  minisgl bench kernels rms_norm attention_decode --json rows.jsonl --plot roofline.png
  minisgl bench kernels attention_prefill --tune tiles.json
"""
REPORT_EXAMPLES = """\b
Examples:
  minisgl bench report
"""


@click.group(epilog=EXAMPLES)
def bench() -> None:
    """Measure the engine and its kernels on this machine."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `minisgl run` does, and says why


bench.add_command(serve)


@bench.command(cls=OneLineErrors, epilog=THROUGHPUT_EXAMPLES)
@workload_option
@run_options
@baseline_option
@click.option(
    "--profile",
    "profile_dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="After the timed runs, trace 20 steps from the middle of one more: DIR/trace.json, DIR/kernels.txt.",
)
@engine_options
def throughput(engine: dict[str, Any], **flags: Any) -> None:
    """Run a workload offline and print tokens per second."""
    from minisgl.bench.throughput import ratio, run, table

    _print(run(**flags, **engine), table, ratio)
    if folder := flags["profile_dir"]:
        click.echo(f"\n{(folder / 'kernels.txt').read_text()}\n{folder / 'trace.json'}: the steps, for ui.perfetto.dev")


@bench.command(cls=OneLineErrors, epilog=LATENCY_EXAMPLES)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Requests, handed over at once.")
@click.option("--input-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each answer.")
@run_options
@baseline_option
@engine_options
def latency(engine: dict[str, Any], **flags: Any) -> None:
    """Run equal requests together and print how long each waits for its tokens."""
    from minisgl.bench.latency import ratio, run, table

    _print(run(**flags, **engine), table, ratio)


@bench.command(cls=OneLineErrors, epilog=START_EXAMPLES)
@json_option
@repeats_option
@model_option
@engine_options
def start(engine: dict[str, Any], **flags: Any) -> None:
    """Start engines in processes of their own and print how long each takes."""
    from minisgl.bench.start import run, table

    _print(run(**flags, **engine), table)


def _print(rows: Iterable[Row], table: Callable[[Row], str], ratio: Callable[[Row, Row], float] | None = None) -> None:
    """Print each row as it comes and, with `ratio`, how the first compares to each of the others, its baselines."""
    first = None
    for row in rows:
        click.echo(table(row))
        if first and ratio:
            click.echo(f"{first['engine']} is {ratio(first, row):.2f} times as fast as {row['engine']}")
        first = first or row


@bench.command(cls=OneLineErrors, epilog=FEATURES_EXAMPLES)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Requests that decode together.")
@click.option("--input-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(16), default=128, show_default=True, help="Tokens of each answer.")
@run_options
@engine_options
def features(engine: dict[str, Any], **flags: Any) -> None:
    """Measure what each thing that requests can ask for costs a decode step, and --deterministic."""
    from minisgl.bench.features import run, table

    _print(run(**flags, **engine), table)


@bench.command("batch_run", cls=OneLineErrors, epilog=BATCH_RUN_EXAMPLES)
@workload_option
@run_options
@engine_options
def batch_run(engine: dict[str, Any], **flags: Any) -> None:
    """Measure what `minisgl run` costs over LLM.generate, and its journal."""
    from minisgl.bench.batch_run import run, table

    _print(run(**flags, **engine), table)


@bench.command("eval", cls=OneLineErrors, epilog=EVAL_EXAMPLES)
@click.option("--rows", type=click.IntRange(1), default=256, show_default=True, help="Questions with four answers.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Words that all rows share.")
@run_options
@click.option(
    "--baseline", type=click.Choice(("lm-eval",)), help="Then lm-evaluation-harness's `hf` class, for a ratio."
)
@click.option("--hf-batch", type=click.IntRange(1), default=16, show_default=True, help="Texts it computes at once.")
@engine_options
def evaluate(engine: dict[str, Any], **flags: Any) -> None:
    """Measure multiple choice with and without the prefix cache."""
    from minisgl.bench.evaluate import ratio, run, table

    _print(run(**flags, **engine), table, ratio)


@bench.command(cls=OneLineErrors, epilog=PERPLEXITY_EXAMPLES)
@click.option("--tokens", type=click.IntRange(2), default=8192, show_default=True, help="Of the text.")
@click.option("--layers", type=click.IntRange(1), help="Of the model's shape, with random weights: less to compute.")
@json_option
@model_option
@engine_options
def perplexity(engine: dict[str, Any], **flags: Any) -> None:
    """Measure the memory that a long text's logprobs take."""
    from minisgl.bench.perplexity import run, table

    _print(run(**flags, **engine), table)


@bench.command(cls=OneLineErrors, epilog=KERNELS_EXAMPLES)
@click.argument("ops", nargs=-1, metavar="[OP]...")
@json_option
@file_option("plot", "Draw a roofline of what was measured (.png, .svg or .pdf).")
@file_option(
    "tune", "Instead: time the candidate tiles of each OP here, check them, and put the best into this JSON tile table."
)
@engine_flag("device")
def kernels(ops: tuple[str, ...], device: str | None, tune_path: Path | None, **flags: Any) -> None:
    """Time the kernels named OP, or all of them, beside their floor."""
    if tune_path:
        from minisgl.bench.tuning import tune

        tune(list(ops), device or "auto", tune_path)
    else:
        from minisgl.bench.kernels import run

        run(list(ops), device or "auto", **flags)


@bench.command(cls=OneLineErrors, epilog=REPORT_EXAMPLES)
def report() -> None:
    """Write bench/README.md and its plots from the rows in bench/results (needs a checkout)."""
    from minisgl.bench.report import write_report

    for path in write_report():
        click.echo(path)
