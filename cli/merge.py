"""`minisgl merge`: the results of `minisgl run --shard` put together."""

from pathlib import Path

import click

from minisgl.batch_run.merge import merge as merge_parts
from minisgl.cli.options import OneLineErrors

EXAMPLES = """\b
Examples:
  minisgl run big.jsonl --shard 1/2      on one machine
  minisgl run big.jsonl --shard 2/2      on another one
  minisgl merge big.1-of-2.results.jsonl big.2-of-2.results.jsonl -o big.results.jsonl
"""


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Put the results of --shard together.")
@click.argument("parts", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="ALL", required=True, type=click.Path(path_type=Path), help="The whole result.")
def merge(parts: tuple[Path, ...], output: Path) -> None:
    """Write the rows of every OUT, one for each shard, to one file in the order of the input.

    Nothing is written unless all shards are there and complete. Each OUT needs its OUT.manifest.json beside it, and its
    OUT.journal.jsonl where the run made one.
    """
    click.echo(f"{merge_parts(parts, output):,} rows in {output}", err=True)
