"""`minisgl bench serve`: flags for the measurement of a running server, which minisgl.bench.serve does."""

from typing import Any

import click

from minisgl.cli.bench_options import file_option, json_option, warmups_option, workload_option
from minisgl.cli.options import OneLineErrors

FIGURES = """\b
Figures, in ms mean, median and p99 over the answered requests (ITL: over all gaps), as the client sees them:
  TTFT             time to first token = when the first token comes - when the request was sent
  ITL              inter-token latency = when a token comes - when the one before it came; those of a chunk came evenly
  TPOT             time per output token = (last token - first token) / (output tokens - 1)
  E2E              end to end = end of the answer - when the request was sent
  requests/s       answered requests / seconds from the first request's moment to the last answer's end
  output tokens/s  output tokens / these seconds; input tokens/s likewise, cached ones too
  goodput          requests whose every figure (ITL: mean of its gaps) is within the limits / all requests
  late             when a request was sent - its moment of the Poisson process: more than 1 ms is the client's fault
  of offline       output tokens/s / those of `bench throughput`: from the prompts to the last result, no HTTP
"""
EXAMPLES = f"""\b
Requests come at the moments of a Poisson process, as many a second as --request-rate says, whatever was answered (open
loop). "inf" sends all at once; with --max-concurrency, another as soon as one ends (closed loop). The prefix cache is
emptied before each run; warm-up sends all requests at once. Prompts are token ids and answers go on past the end of
text, as in `bench throughput`, whose help has the workloads.

{FIGURES}
\b
Examples:
  minisgl bench serve --request-rate 8,32 --workload 512x128 --goodput ttft:200,itl:20
  minisgl bench serve --url http://host:30000 --workload mini --max-concurrency 64 --json rows.jsonl --plot load.png
  minisgl bench serve --workload mini --offline bench/results/throughput.jsonl
"""


METRICS = ("ttft", "itl", "tpot", "e2e")


def read_rates(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    """8,32,inf"""
    try:
        rates = [float(rate) for rate in value.split(",")]
    except ValueError:
        rates = [0]
    if not all(rate > 0 for rate in rates):
        raise click.BadParameter(f"{value!r} must be requests per second, such as 8 or 8,32,inf")
    return rates


def read_limits(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, float] | None:
    """ttft:200,itl:20"""
    if value is None:
        return None
    limits: dict[str, float] = {}
    for part in value.split(","):
        name, _, limit = part.strip().partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = 0
        if name not in METRICS or not limits[name] > 0:
            raise click.BadParameter(f"{part!r} must be NAME:MS, with a name of {', '.join(METRICS)}: ttft:200,itl:20")
    return limits


@click.command(cls=OneLineErrors, epilog=EXAMPLES)
@click.option(
    "--url",
    default="http://127.0.0.1:30000",
    show_default=True,
    help="A running server; its keys are in MINISGL_API_KEY and MINISGL_ADMIN_KEY.",
)
@workload_option
@click.option(
    "--request-rate",
    "request_rates",
    callback=read_rates,
    default="inf",
    show_default=True,
    metavar="RATES",
    help="Requests per second; several with commas, each a run.",
)
@click.option("--max-concurrency", type=click.IntRange(1), help="Most requests on their way at once. [default: any]")
@click.option("--goodput", callback=read_limits, metavar="LIMITS", help="Most ms of figures, as ttft:200,itl:20.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the Poisson process.")
@warmups_option
@file_option(
    "offline", "Rows of `bench throughput --json FILE`: print the share of their speed that the server reaches."
)
@json_option
@file_option("plot", "Draw latency and throughput over the request rate (.png, .svg or .pdf).")
def serve(**flags: Any) -> None:
    """Send requests to a running server and print how long they wait."""
    from minisgl.bench.serve import run, table

    for row in run(**flags):
        click.echo(table(row))
    click.echo("\n" + FIGURES.removeprefix("\b\n"), nl=False)
