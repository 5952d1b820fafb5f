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


def aligned(rows: list[list[str]], num_words: int = 2) -> str:
    """Columns: the first `num_words` start at the left, figures end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [*zip(row, widths, strict=True)]
        words, figures = cells[:num_words], cells[num_words:]
        texts = [cell.ljust(width) for cell, width in words] + [cell.rjust(width) for cell, width in figures]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)
