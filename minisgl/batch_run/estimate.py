"""`minisgl run --dry-run`: what a job would take, from its rows and the shapes of the model. No weights are loaded.

    weights  P parameters x bytes each            KV  2 x layers x KV heads x head size x bytes, for each token
    time     2 P operations for each token, and one read of weights and KV for each decode step of `max_running` rows

The device's operations and bytes a second are measured first, for a moment. The time is a floor: prompts share no
prefix, every row uses all of its max_tokens, and nothing but these reads and operations takes time.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from minisgl.batch_run.feeder import CHUNK_ITEMS
from minisgl.batch_run.job import Job, JobOptions
from minisgl.batch_run.prompts import PromptMaker
from minisgl.config import EngineConfig
from minisgl.core import RequestMaker
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.generation import generation_defaults
from minisgl.resolve import resolve
from minisgl.text_requests import TextRequests
from minisgl.tokenizer import Tokenizer
from minisgl.weights import resolve_model

PROBE_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that are multiplied
PROBE_BYTES = 256 << 20
PROBE_CALLS = 5


@dataclass
class Totals:
    """Of the rows that would be answered: samples, and their tokens. `errors` counts the others by type."""

    rows: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def estimate(options: JobOptions) -> str:
    """A table for people. MinisglError for a command that could not run. Nothing is written."""
    folder = resolve_model(options.model or "")
    model = ModelConfig.from_folder(folder)
    config = resolve(EngineConfig(model=str(folder), **options.engine), model)
    tokenizer = Tokenizer.of_folder(folder)
    defaults = generation_defaults(folder, model, tokenizer.eos_id if tokenizer else None)
    with (
        Job(replace(options, output=os.devnull, retry_errors=False, ordered=False)) as job,
        closing(TextRequests(RequestMaker(config, model, defaults), tokenizer)) as requests,
    ):
        totals = _count(job, requests)
    dtype: torch.dtype = getattr(torch, config.dtype)
    decoder = Decoder(model, device=torch.device("meta"), dtype=dtype, max_len=1)
    parameters = sum(target.parameter.numel() for target in decoder.targets().values())
    weight_bytes = parameters * dtype.itemsize
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize  # a token
    mean_len = (totals.prompt_tokens + totals.output_tokens) / max(1, totals.samples)
    running = min(config.max_running, max(1, totals.samples))
    kv_total = kv_bytes * mean_len * running
    operations_per_s, bytes_per_s = _probe(torch.device(config.device), dtype)
    compute_s = 2 * parameters * (totals.prompt_tokens + totals.output_tokens) / operations_per_s
    read_s = totals.output_tokens / running * (weight_bytes + kv_total) / bytes_per_s
    failed = ", ".join(f"{count:,} {kind}" for kind, count in totals.errors.most_common()) or "none"
    return "\n".join(
        [
            f"rows     {totals.rows:,}, of which {totals.errors.total():,} would fail ({failed})",
            f"tokens   {totals.prompt_tokens:,} prompt, at most {totals.output_tokens:,} output",
            f"memory   {weight_bytes / 2**30:,.2f} GiB weights, {kv_total / 2**30:,.2f} GiB KV for {running:,} rows at "
            f"once of {mean_len:,.0f} tokens ({config.dtype})",
            f"time     {tqdm.format_interval(max(compute_s, read_s))} or more for all of that, on {config.device} "
            f"({operations_per_s / 1e12:,.2f} TFLOP/s, {bytes_per_s / 1e9:,.0f} GB/s measured), loading not counted",
        ]
    )


def _count(job: Job, model: TextRequests) -> Totals:
    totals = Totals()
    maker = PromptMaker(model, on_long=job.options.on_long, leaders=job.leaders)
    rows = map(job.parse, job.records())
    with tqdm(total=job.count(), unit="row", disable=None) as bar:
        while chunk := list(islice(rows, CHUNK_ITEMS)):
            bar.update(len(chunk))
            totals.rows += len(chunk)
            for prepared in maker.prepare(chunk):
                if prepared.error:
                    totals.errors[prepared.error.type] += 1
                for request in prepared.requests:
                    totals.samples += 1
                    totals.prompt_tokens += request.num_prompt
                    totals.output_tokens += request.max_total - request.num_prompt
    return totals


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations and bytes that the device does in a second, when it does nothing else."""
    size = PROBE_SIZE[device.type]
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    operations = 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)
    return operations, 2 * PROBE_BYTES / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The mean time of one call, after a first one."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    started = wait()
    for _ in range(PROBE_CALLS):
        call()
    return (wait() - started) / PROBE_CALLS
