"""How many tokens a second the whole engine makes on a workload: `minisgl bench throughput`.

A run is the workload from handing over the prompts to its last result; loading and warm-up are outside, and the prefix
cache is emptied before each. Weights may be random: speed does not depend on their values, and EOS is ignored.
"""

import statistics
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minisgl.bench.engines import BenchEngine, MinisglEngine, find_model
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import WORKLOADS, Workload, load
from minisgl.models.config import ModelConfig


def run(
    model: str,
    workload: str,
    *,
    repeats: int = 3,
    warmups: int = 1,
    json_path: Path | None = None,
    baseline: str | None = None,
    profile_dir: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure one workload; returns a row for minisgl and one for `baseline` ("transformers"), if given, and appends
    them to `json_path`.

    `model` is a folder, a Hugging Face id, or one of the shapes in bench/models (random weights); `workload` a name or
    a file. `options` are those of `LLM`. `profile_dir`: trace some steps of one more run into that folder. Raises
    MinisglError for an unknown workload and for one that does not fit the model.
    """
    folder, is_shape = find_model(model)
    if is_shape:
        options = {"load_format": "dummy", **options}
    work = load(workload, folder, ModelConfig.from_folder(folder).vocab_size)
    name = workload if workload in WORKLOADS else Path(workload).name
    rows = []
    with MinisglEngine(folder, options) as engine:
        rows.append(_measure(engine, model, name, work, repeats, warmups))
        if profile_dir:
            _trace(engine, work, profile_dir)
    if baseline:
        with open_baseline(baseline, folder, options) as engine:
            rows.append(_measure(engine, model, name, work, repeats, warmups))
    if json_path:
        write_rows(json_path, rows)
    return rows


def open_baseline(name: str, folder: Path, options: dict[str, Any]) -> AbstractContextManager[BenchEngine]:
    """The engine to compare with, by the name that --baseline takes."""
    assert name == "transformers"
    from minisgl.bench.transformers_engine import TransformersEngine

    return TransformersEngine(folder, options)


def _measure(engine: BenchEngine, model: str, name: str, work: Workload, repeats: int, warmups: int) -> dict[str, Any]:
    for _ in range(warmups):
        engine.run(work)
    outcomes = [engine.run(work) for _ in range(repeats)]
    seconds = [outcome.seconds for outcome in outcomes]
    median, output_tokens = statistics.median(seconds), outcomes[-1].output_tokens
    return {
        "bench": "throughput",
        "engine": engine.name,
        "model": model,
        "workload": name,
        "output_tokens_per_s": round(output_tokens / median, 1),
        "input_tokens_per_s": round(work.num_prompt_tokens / median, 1),
        "seconds": round(median, 4),
        "seconds_all": [round(value, 4) for value in seconds],
        "prompt_tokens": work.num_prompt_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": outcomes[-1].cached_tokens,
        "ready_s": round(engine.ready_s, 2),
        "dtype": engine.dtype,
        **engine.facts(),
        **environment(engine.device),
    }


def _trace(engine: MinisglEngine, work: Workload, folder: Path) -> None:
    """Trace steps from the middle of a run, which an untraced one has counted."""
    from minisgl.profile import STEPS, trace

    num_steps = 0

    def count() -> None:
        nonlocal num_steps
        num_steps += 1

    for after_step in (count, None):
        engine.llm.reset_prefix_cache()
        engine.submit(work)
        if after_step:
            engine.drain(after_step)
        else:
            with trace(folder, engine.device, skip=max(0, (num_steps - STEPS) // 2)) as step_done:
                engine.drain(step_done)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: each figure's median with its smallest and largest, and what the first is to the second."""
    lines = []
    for row in rows:
        low, high = min(row["seconds_all"]), max(row["seconds_all"])
        lines.append(f"{row['engine']}, {row['model']}, {row['workload']}, {row['dtype']}, {row['device']}")
        for what in ("output", "input"):
            tokens = row["output_tokens" if what == "output" else "prompt_tokens"]
            spread = f"({tokens / high:,.1f} .. {tokens / low:,.1f})"
            lines.append(f"  {what + ' tokens/s':<16} {row[what + '_tokens_per_s']:,.1f}  {spread}")
        lines.append(
            f"  {'seconds':<16} {row['seconds']:.3f}  ({low:.3f} .. {high:.3f}), {len(row['seconds_all'])} runs"
        )
        lines.append(f"  {'tokens':<16} {row['prompt_tokens']:,} in, {row['output_tokens']:,} out")
        if row["cached_tokens"] >= 0:
            lines[-1] += f", {row['cached_tokens']:,} from the cache"
        lines.append(f"  {'ready_s':<16} {row['ready_s']:.2f}")
    if len(rows) == 2:
        lines.append(f"{rows[0]['engine']} takes 1/{rows[1]['seconds'] / rows[0]['seconds']:.2f} of the time")
    return "\n".join(lines)
