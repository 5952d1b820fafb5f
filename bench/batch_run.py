"""What the batch runner costs: `minisgl bench batch_run`.

Both sides of the overhead run in turn on one engine with an empty prefix cache; the row has the median of each. The
command's help has the formula of each figure.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minisgl.batch_run.answers import Line
from minisgl.batch_run.job import Job, JobOptions
from minisgl.batch_run.journal import Journal
from minisgl.bench.engines import find_model
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import TEMPERATURE, Workload, load, name_of
from minisgl.llm import LLM
from minisgl.models.config import ModelConfig
from minisgl.request import SamplingParams

NUM_ROWS, ROW_BYTES, ROWS_A_STEP = 200_000, 1024, 8


def run(
    model: str,
    workload: str,
    *,
    repeats: int = 3,
    warmups: int = 1,
    json_path: Path | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """A row for the journal and one for the overhead; arguments and errors as in `throughput.run`."""
    folder, options = find_model(model, options)
    work = load(workload, folder, ModelConfig.from_folder(folder).vocab_size)
    name = name_of(workload)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    for measure in (journal, lambda: _overhead(model, name, folder, work, repeats, warmups, options)):
        row = measure()
        if json_path:
            write_rows(json_path, [row])
        yield row


def _overhead(
    model: str, name: str, folder: Path, work: Workload, repeats: int, warmups: int, options: dict[str, Any]
) -> dict[str, Any]:
    sides: dict[str, list[float]] = {"generate": [], "job": []}
    with TemporaryDirectory() as place, LLM(folder, **options) as llm:
        prompts = Path(place) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in _rows(work)))
        for repeat in range(-warmups, repeats):
            for side, seconds in sides.items():
                llm.reset_prefix_cache()
                started = time.perf_counter()
                if side == "generate":
                    llm.generate(work.prompts, [_params(length) for length in work.output_lens])
                else:
                    _run_job(llm, prompts, str(Path(place) / f"{repeat}.jsonl"), str(folder))
                if repeat >= 0:
                    seconds.append(time.perf_counter() - started)
        device, dtype = torch.device(llm.config.device), llm.config.dtype
    generate, job = (statistics.median(seconds) for seconds in sides.values())
    return {
        "bench": "batch_run",
        "model": model,
        "workload": name,
        "overhead": round(job / generate - 1, 4),
        "generate_s": [round(value, 4) for value in sides["generate"]],
        "job_s": [round(value, 4) for value in sides["job"]],
        "dtype": dtype,
        **environment(device),
    }


def journal() -> dict[str, Any]:
    """A row: how fast results can be appended and made durable in the folder for temporary files."""
    data = b"x" * (ROW_BYTES - 1) + b"\n"
    with TemporaryDirectory() as place:
        opened = Journal(Path(place) / "journal.jsonl")
        started = time.perf_counter()
        for first in range(0, NUM_ROWS, ROWS_A_STEP):
            opened.append([Line(index, 1, False, data) for index in range(first, first + ROWS_A_STEP)])
        opened.finish()
        seconds = time.perf_counter() - started
        opened.close()
    return {
        "bench": "journal",
        "rows_per_s": round(NUM_ROWS / seconds),
        "row_bytes": ROW_BYTES,
        "rows_a_step": ROWS_A_STEP,
        **environment(torch.device("cpu")),
    }


def _rows(work: Workload) -> list[dict[str, Any]]:
    return [
        {"prompt_token_ids": prompt, "max_tokens": length, "temperature": TEMPERATURE, "ignore_eos": True}
        for prompt, length in zip(work.prompts, work.output_lens, strict=True)
    ]


def _params(length: int) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, max_tokens=length, ignore_eos=True)


def _run_job(llm: LLM, prompts: Path, output: str, model: str) -> None:
    with Job(JobOptions([str(prompts)], output, model)) as job:
        job.answer(llm)
        job.finish()


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    if row["bench"] == "journal":
        return f"journal  {row['rows_per_s']:,} rows/s of {row['row_bytes']:,} bytes, {row['rows_a_step']} at a time"
    lines = [f"{row['model']}, {row['workload']}, {row['dtype']}, {row['device']}"]
    for side in ("generate", "job"):
        seconds = row[f"{side}_s"]
        spread = f"({min(seconds):.3f} .. {max(seconds):.3f}), {len(seconds)} timed"
        lines.append(f"  {side + ' s':<11} {statistics.median(seconds):.3f}  {spread}")
    lines.append(f"  {'overhead':<11} {row['overhead']:.2%}")
    return "\n".join(lines)
