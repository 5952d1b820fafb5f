"""Flags that several of the `minisgl bench` commands have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def file_option(name: str, help: str) -> Callable[[Command], Command]:
    """--NAME FILE, which the command gets as NAME_path."""
    return click.option(f"--{name}", f"{name}_path", type=click.Path(path_type=Path, dir_okay=False), help=help)


json_option = file_option(
    "json", "Also append the figures to this file, as JSON lines with device, commit, versions and date."
)


workload_option = click.option(
    "--workload",
    default="mini",
    show_default=True,
    metavar="WORKLOAD",
    help="mini (mini1024: of more requests), single, prefill, shared_prefix, a shape such as 512x128, or a file of "
    "JSON lines.",
)
baseline_option = click.option(
    "--baseline",
    type=click.Choice(("transformers",)),
    help="Then the same work through transformers' continuous batching, for a ratio.",
)


model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    default="qwen3-0.6b",
    show_default=True,
    help="Model folder, Hugging Face id, or a shape of bench/models with random weights.",
)
warmups_option = click.option(
    "--warmups", type=click.IntRange(0), default=1, show_default=True, help="Untimed runs before the first."
)

repeats_option = click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs.")


def run_options(command: Command) -> Command:
    """The flags of every measurement of a whole engine."""
    for option in (
        json_option,
        warmups_option,
        repeats_option,
        model_option,
    ):
        command = option(command)
    return command
