"""Tables of results for a terminal. Knows results; does not know how they came about."""

from typing import Any

from minisgl.evaluate.results import RESULTS

MAX_METRICS = 30  # in the table; results.json has all


def results_table(results: dict[str, Any]) -> str:
    """Metrics, and below them what they come from."""
    rows = [["task", "metric", "value", "stderr", "n", "no answer", "cut off"]]
    for one in results["metrics"][:MAX_METRICS]:
        value = "not run" if one["value"] is None else f"{one['value']:.4f}"
        stderr = "" if one["stderr"] is None else f"{one['stderr']:.4f}"
        rates = [f"{one[rate]:.1%}" if rate in one else "" for rate in ("extraction_failure_rate", "truncation_rate")]
        rows.append([one["task"], one["metric"], value, stderr, f"{one['n']:,}", *rates])
    lines = [aligned(rows)]
    if len(results["metrics"]) > MAX_METRICS:
        lines.append(f"... and {len(results['metrics']) - MAX_METRICS:,} more in {RESULTS}")
    if results.get("outputs_not_run"):
        lines.append(f"{results['outputs_not_run']:,} programs were not run: --allow-code runs them, with limits")
    lines.append(f"rows     {results['rows']:,}, {results['rows_with_errors']:,} with errors")
    if results["rows_with_errors"]:
        lines[-1] += f", which count as wrong. First: {results['first_error']}"
    if "prompt_hash" in results:
        lines.append(f"prompt   {results['prompt_hash']}")
    lines.append(f"model    {results['model']}, revision {results['model_revision']}, seed {results['seed']}")
    if results["seconds"] is not None:
        speed = f", {results['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in results else ""
        lines.append(f"speed    {results['seconds']:.1f} s{speed}")
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> str:
    """Columns, the texts of the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(row))
        for row in ([*zip(cells, widths, strict=True)] for cells in rows)
    )
