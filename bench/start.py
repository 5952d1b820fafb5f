"""How long an engine takes from nothing to its first answer: `minisgl bench start`.

Each start is a process of its own, and its clock runs from before the process: what Python imports is in it. A cold one
has an empty folder for what Triton compiles, a warm one the folder that the one before it left; the operating system
has torch's files in memory from the second start on.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from triton import knobs

from minisgl import LLM, SamplingParams
from minisgl.bench.engines import find_model, shown
from minisgl.bench.harness import environment, write_rows
from minisgl.errors import MinisglError

CACHES = ("cold", "warm")
FIGURES = ("ready_s", "answer_s")


def run(model: str, *, repeats: int = 3, json_path: Path | None = None, **options: Any) -> Iterator[dict[str, Any]]:
    """A row for starts with cold caches, and one for warm ones, which take turns. Arguments as in `throughput.run`;
    MinisglError for an engine that does not start."""
    folder, options = find_model(model, options)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    starts: dict[str, list[dict[str, Any]]] = {caches: [] for caches in CACHES}
    for _ in range(repeats):
        with TemporaryDirectory() as cache:
            for caches in CACHES:
                starts[caches].append(_start(folder, options, cache))
    for caches, each in starts.items():
        row = {
            "bench": "start",
            "engine": "minisgl",
            "model": model,
            "caches": caches,
            **{name: round(statistics.median(one[name] for one in each), 4) for name in FIGURES},
            **{f"{name}_all": [round(one[name], 4) for one in each] for name in FIGURES},
            "num_compiled": each[-1]["num_compiled"],
            "num_devices": each[-1]["num_devices"],
            "dtype": each[-1]["dtype"],
            "options": shown(options),
            **environment(torch.device(each[-1]["device"])),
        }
        if json_path:
            write_rows(json_path, [row])
        yield row


def _start(folder: Path, options: dict[str, Any], cache: str) -> dict[str, Any]:
    """One start: when the engine was ready and when it had answered, in seconds, and what it says of itself."""
    command = [sys.executable, "-m", "minisgl.bench.start", str(folder), json.dumps(options)]
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_CACHE_DIR": cache}
    ) as one:
        assert one.stdout is not None
        told: dict[str, Any] = {}
        for name in FIGURES:
            line = one.stdout.readline()
            told |= {name: time.perf_counter() - started, **json.loads(line or '{"error": "it ended without a word"}')}
            if "error" in told:
                raise MinisglError(f"the engine does not start: {told['error']}")
    return told


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    lines = [f"{row['engine']}, {row['model']}, {row['caches']} caches, {row['dtype']}, {row['device']}"]
    for name in FIGURES:
        each = row[f"{name}_all"]
        lines.append(f"  {name:<12} {row[name]:.2f} ({min(each):.2f} .. {max(each):.2f}), {len(each)} timed")
    return "\n".join([*lines, f"  compiled     {row['num_compiled']} kernels"])


def main(folder: str, options: dict[str, Any]) -> None:
    """Be the process that starts: a line when the engine is ready, and one when it has answered."""
    compiled = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        compiled.append(not cache_hit)

    knobs.compilation.listener = listen
    try:
        with LLM(folder, **options) as llm:
            config = llm.config
            ready = {"device": config.device, "dtype": config.dtype, "num_devices": config.tp * config.dp}
            print(json.dumps(ready), flush=True)
            llm.generate([[0, 0, 0]], SamplingParams(max_tokens=1, ignore_eos=True))
            print(json.dumps({"num_compiled": sum(compiled)}), flush=True)
    except MinisglError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
