"""`minisgl eval compare`: two results of the same questions, and a paired test of them."""

from pathlib import Path

import click

from minisgl.cli.options import OneLineErrors
from minisgl.cli.tables import aligned

COMPARE_EXAMPLES = """\b
Examples:
  minisgl eval compare before.eval after.eval
"""


@click.command(cls=OneLineErrors, epilog=COMPARE_EXAMPLES, short_help="Test whether B is better than A.")
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@click.option("--flips", type=click.IntRange(0), default=10, help="Most rows to list of each kind. [default: 10]")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it as JSON.")
def compare(a: Path, b: Path, flips: int, json_path: Path | None) -> None:
    """Compare two results of the same questions: the difference, a paired test, and the rows that flipped.

    A and B are folders of `minisgl eval`.
    """
    from minisgl.evaluate.compare import compare as compare_results

    report = compare_results(a, b)
    rows = [["metric", "A", "B", "B - A", "95%", "p", "test", "n", "better", "worse"]]
    for one in report.metrics:
        interval = f"{one.low:+.4f} to {one.high:+.4f}"
        numbers = [f"{one.a:.4f}", f"{one.b:.4f}", f"{one.difference:+.4f}", interval, f"{one.p:.3g}", one.test]
        rows.append([one.metric, *numbers, f"{one.n:,}", f"{one.better:,}", f"{one.worse:,}"])
    click.echo(aligned(rows, num_words=1))
    if report.only_a or report.only_b:
        click.echo(f"Not compared: {report.only_a:,} rows that only A has, {report.only_b:,} that only B has.")
    for title, changed in (("right only in B", report.gained), ("right only in A", report.lost)):
        click.echo(f"{title}: {len(changed):,}")
        for flip in changed[:flips]:
            click.echo(f"  {flip.id}: {flip.answer_a!r} -> {flip.answer_b!r}, target {flip.target!r}")
    if json_path:
        report.save(json_path)
