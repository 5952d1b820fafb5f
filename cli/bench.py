"""`minisgl bench`: flags for the measurements in minisgl.bench, which do the work."""

from pathlib import Path
from typing import Any

import click

from minisgl.cli.options import OneLineErrors, engine_flag, engine_options

EXAMPLES = """\b
Examples:
  minisgl bench throughput --workload mini
  minisgl bench kernels rms_norm attention_decode
"""
THROUGHPUT_EXAMPLES = """\b
Examples:
  minisgl bench throughput --workload mini
  minisgl bench throughput --workload shared_prefix -m path/to/model --repeats 5 --json rows.json
"""
KERNELS_EXAMPLES = """\b
Examples:
  minisgl bench kernels
  minisgl bench kernels rms_norm attention_decode --json kernels.json
"""

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also add the figures to this file."
)


@click.group(epilog=EXAMPLES)
def bench() -> None:
    """Measure the engine and its kernels on this machine."""


@bench.command(cls=OneLineErrors, epilog=THROUGHPUT_EXAMPLES)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    default="qwen3-0.6b",
    show_default=True,
    help="Model folder, Hugging Face id, or a shape of bench/models with dummy weights.",
)
@click.option(
    "--workload",
    type=click.Choice(("mini", "single", "prefill", "shared_prefix")),
    default="mini",
    show_default=True,
    help="Which requests to run.",
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of the workload.")
@json_option
@engine_options
def throughput(model: str, workload: str, repeats: int, json_path: Path | None, engine: dict[str, Any]) -> None:
    """Run a workload offline and print tokens per second."""
    from minisgl.bench.throughput import run

    figures = run(model, workload, repeats=repeats, json_path=json_path, **engine)
    for name, value in figures.items():
        click.echo(f"{name:<24} {value}")


@bench.command(cls=OneLineErrors, epilog=KERNELS_EXAMPLES)
@click.argument("ops", nargs=-1, metavar="[OP]...")
@json_option
@engine_flag("device")
def kernels(ops: tuple[str, ...], json_path: Path | None, device: str | None) -> None:
    """Time the kernels named OP, or all of them, beside their floor."""
    from minisgl.bench.kernels import run

    run(list(ops), device or "auto", json_path)
