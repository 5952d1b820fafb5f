"""What the batch runner costs: `python -m minisgl.bench.batch_run [MODEL]`.

    overhead   seconds of a job, from file to durable results, over those of LLM.generate on its prompts, minus 1
    journal    rows of ROW_BYTES that are appended and fsynced in a second, ROWS_A_STEP at a time

Both sides of the overhead run in turn on one engine with an empty prefix cache; the row has the median of each.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minisgl.batch_run.answers import Line
from minisgl.batch_run.job import Job, JobOptions
from minisgl.batch_run.journal import Journal
from minisgl.bench.engines import TEMPERATURE, find_model
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import Workload, load
from minisgl.llm import LLM
from minisgl.models.config import ModelConfig
from minisgl.request import SamplingParams

RESULTS = Path(__file__).parent / "results" / "batch_run.jsonl"
REPEATS = 5
NUM_ROWS, ROW_BYTES, ROWS_A_STEP = 200_000, 1024, 8


def overhead(model: str, workload: str = "mini", **options: Any) -> dict[str, Any]:
    """A row: the same work through LLM.generate and through a job. Raises MinisglError when it does not fit."""
    folder, options = find_model(model, options)
    work = load(workload, folder, ModelConfig.from_folder(folder).vocab_size)
    sides: dict[str, list[float]] = {"generate": [], "job": []}
    with TemporaryDirectory() as place, LLM(folder, **options) as llm:
        prompts = Path(place) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in _rows(work)))
        for repeat in range(REPEATS + 1):  # the first is the warm-up
            for side, seconds in sides.items():
                llm.reset_prefix_cache()
                started = time.perf_counter()
                if side == "generate":
                    llm.generate(work.prompts, [_params(length) for length in work.output_lens])
                else:
                    _run_job(llm, prompts, str(Path(place) / f"{repeat}.jsonl"), str(folder))
                if repeat:
                    seconds.append(time.perf_counter() - started)
        device = llm.engine.device
    generate, job = (statistics.median(seconds) for seconds in sides.values())
    return {
        "bench": "batch_run",
        "model": model,
        "workload": workload,
        "overhead": round(job / generate - 1, 4),
        "generate_s": [round(value, 4) for value in sides["generate"]],
        "job_s": [round(value, 4) for value in sides["job"]],
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


if __name__ == "__main__":
    for row in (journal(), *(overhead(name) for name in sys.argv[1:])):
        write_rows(RESULTS, [row])
        print(json.dumps(row))
