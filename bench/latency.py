"""How long one request waits among `batch` equal ones: `minisgl bench latency`.

All requests of a batch are handed over at once; they share no prefix, and the prefix cache is empty. A token's time is
when the host has it, as a client would see it. The command's help has the
formula of each figure.
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.bench.engines import BenchEngine, Outcome, find_model, open_engines
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import Workload, fold, uniform
from minisgl.models.config import ModelConfig

METRICS = ("ttft_ms", "itl_ms", "e2e_ms")
PERCENTILES = (50, 90, 99)


def run(
    model: str,
    *,
    batch: int = 1,
    input_len: int = 128,
    output_len: int = 128,
    repeats: int = 3,
    warmups: int = 1,
    json_path: Path | None = None,
    baseline: str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Measure `batch` requests of `input_len` and `output_len` tokens; other arguments and the rows as in
    `throughput.run`."""
    folder, options = find_model(model, options)
    work = fold(uniform(batch, input_len, output_len), ModelConfig.from_folder(folder).vocab_size)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    for engine in open_engines(folder, options, baseline):
        row = _measure(engine, model, work, repeats, warmups)
        if json_path:
            write_rows(json_path, [row])
        yield row


def _measure(engine: BenchEngine, model: str, work: Workload, repeats: int, warmups: int) -> dict[str, Any]:
    for _ in range(warmups):
        engine.run(work)
    outcomes = [engine.run(work, with_times=True) for _ in range(repeats)]
    return {
        "bench": "latency",
        "engine": engine.name,
        "model": model,
        "batch": len(work.prompts),
        "input_len": len(work.prompts[0]),
        "output_len": work.output_lens[0],
        "repeats": repeats,
        **{metric: _percentiles([_samples(outcome, metric) for outcome in outcomes]) for metric in METRICS},
        "ready_s": round(engine.ready_s, 2),
        "dtype": engine.dtype,
        **engine.facts(),
        **environment(engine.device),
    }


def _samples(outcome: Outcome, metric: str) -> list[float]:
    """A metric's samples in one repeat, in seconds."""
    if metric == "ttft_ms":
        return [times[0] for times in outcome.token_times]
    if metric == "e2e_ms":
        return [times[-1] for times in outcome.token_times]
    return [after - before for times in outcome.token_times for before, after in pairwise(times)]


def _percentiles(repeats: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Milliseconds at each percentile, and the median of each repeat; None where there are no samples."""
    pooled = [seconds for samples in repeats for seconds in samples]
    if not pooled:  # outputs of one token have no gaps
        return None
    values = np.percentile(pooled, PERCENTILES) * 1e3
    figures: dict[str, Any] = {f"p{q}": round(float(ms), 3) for q, ms in zip(PERCENTILES, values, strict=True)}
    return {**figures, "p50_all": [round(statistics.median(samples) * 1e3, 3) for samples in repeats]}


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    shape = f"{row['batch']} x {row['input_len']} in, {row['output_len']} out"
    lines = [f"{row['engine']}, {row['model']}, {shape}, {row['dtype']}, {row['device']}"]
    for metric in METRICS:
        if figures := row[metric]:
            each = "  ".join(f"p{q} {figures[f'p{q}']:.2f}" for q in PERCENTILES)
            spread = f"p50 of the repeats {min(figures['p50_all']):.2f} .. {max(figures['p50_all']):.2f}"
            lines.append(f"  {metric.removesuffix('_ms').upper():<5} ms  {each}  ({spread})")
    return "\n".join(lines)


def ratio(row: dict[str, Any], baseline: dict[str, Any]) -> float:
    """How many times as fast as the baseline, end to end."""
    return float(baseline["e2e_ms"]["p50"] / row["e2e_ms"]["p50"])
