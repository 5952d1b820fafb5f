"""How many tokens a second the whole engine makes on a workload: `minisgl bench throughput`.

A run is the workload from handing over the prompts to its last result; loading and warm-up are outside, and the prefix
cache is emptied before each. Weights may be random: speed does not depend on their values, and EOS is ignored.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisgl.bench.engines import BenchEngine, MinisglEngine, find_model, open_engines
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import Workload, load, name_of
from minisgl.errors import MinisglError
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
) -> Iterator[dict[str, Any]]:
    """Measure one workload: a row for minisgl and one for `baseline` ("transformers"), if given, each as soon as it is
    measured, and by then also in `json_path`.

    `model` is a folder, a Hugging Face id, or one of the shapes in bench/models (random weights); `workload` a name or
    a file. `options` are those of `LLM`. `profile_dir`: trace some steps of one more run of minisgl into that folder.
    Raises MinisglError for an unknown workload and for one that does not fit the model.
    """
    folder, options = find_model(model, options)
    work = load(workload, folder, ModelConfig.from_folder(folder).vocab_size)
    name = name_of(workload)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    if profile_dir and options.get("dp", 1) > 1:
        raise MinisglError("--profile traces this process, and replicas are others: leave --dp out")
    if profile_dir:
        profile_dir.mkdir(parents=True, exist_ok=True)
    for engine in open_engines(folder, options, baseline):
        row = _measure(engine, model, name, work, repeats, warmups)
        if json_path:
            write_rows(json_path, [row])
        yield row
        if profile_dir and isinstance(engine, MinisglEngine):
            _trace(engine, work, profile_dir)


def _measure(engine: BenchEngine, model: str, name: str, work: Workload, repeats: int, warmups: int) -> dict[str, Any]:
    for _ in range(warmups):
        engine.run(work)
    outcomes = [engine.run(work) for _ in range(repeats)]
    seconds = [round(outcome.seconds, 6) for outcome in outcomes]  # before the rates: they follow from what is written
    median, output_tokens = statistics.median(seconds), outcomes[-1].output_tokens
    return {
        "bench": "throughput",
        "engine": engine.name,
        "model": model,
        "workload": name,
        "output_tokens_per_s": round(output_tokens / median, 1),
        "input_tokens_per_s": round(work.num_prompt_tokens / median, 1),
        "seconds": median,
        "seconds_all": seconds,
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


def table(row: dict[str, Any]) -> str:
    """A row as text: each figure's median with its smallest and largest."""
    low, high, num_runs = min(row["seconds_all"]), max(row["seconds_all"]), len(row["seconds_all"])
    lines = [f"{row['engine']}, {row['model']}, {row['workload']}, {row['dtype']}, {_devices(row)}"]
    for what, tokens in (("output", row["output_tokens"]), ("input", row["prompt_tokens"])):
        spread = f"({tokens / high:,.1f} .. {tokens / low:,.1f})"
        lines.append(f"  {what + ' tokens/s':<16} {row[what + '_tokens_per_s']:,.1f}  {spread}")
    lines.append(f"  {'seconds':<16} {row['seconds']:.3f}  ({low:.3f} .. {high:.3f}), {num_runs} timed")
    lines.append(f"  {'tokens':<16} {row['prompt_tokens']:,} in, {row['output_tokens']:,} out")
    if row["cached_tokens"] >= 0:
        lines[-1] += f", {row['cached_tokens']:,} from the cache"
    lines.append(f"  {'ready_s':<16} {row['ready_s']:.2f}")
    return "\n".join(lines)


def _devices(row: dict[str, Any]) -> str:
    count = row.get("num_devices", 1)
    return f"{count} x {row['device']}" if count > 1 else str(row["device"])


def ratio(row: dict[str, Any], baseline: dict[str, Any]) -> float:
    """How many times as fast as the baseline."""
    return float(baseline["seconds"] / row["seconds"])
