"""How many tokens a second the whole engine makes on a workload: `minisgl bench throughput`.

    output tokens/s = output tokens / seconds        input tokens/s = prompt tokens / seconds

Seconds run from handing over the prompts to the last result; loading and warm-up are outside. The prefix cache is
emptied before each repeat. Weights may be dummies: speed does not depend on their values, and EOS is ignored.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from minisgl.bench.harness import environment, write_rows
from minisgl.bench.workloads import WORKLOADS
from minisgl.errors import MinisglError
from minisgl.llm import LLM
from minisgl.request import SamplingParams

SHAPES = Path(__file__).parent / "models"  # config.json of published models: their shapes, for dummy weights
TEMPERATURE = 0.6


def run(
    model: str, workload: str, *, repeats: int = 3, json_path: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Measure one workload; returns the row, and appends it to `json_path` if given.

    `model` is a folder, a Hugging Face id, or one of the shapes in bench/models (dummy weights). `options` are those of
    `LLM`. Raises MinisglError for an unknown workload.
    """
    if workload not in WORKLOADS:
        raise MinisglError(f"workload is {workload!r}; it must be one of {', '.join(WORKLOADS)}")
    folder = model
    if (SHAPES / model / "config.json").is_file():
        folder, options = str(SHAPES / model), {"load_format": "dummy", **options}
    prompts, lengths = WORKLOADS[workload](0)
    params = [SamplingParams(temperature=TEMPERATURE, max_tokens=length, ignore_eos=True) for length in lengths]
    started = time.perf_counter()
    with LLM(folder, **options) as llm:
        ready_s = time.perf_counter() - started
        llm.generate(
            prompts[:8], [SamplingParams(temperature=TEMPERATURE, max_tokens=4, ignore_eos=True)] * len(prompts[:8])
        )
        seconds = []
        for _ in range(repeats):
            llm.reset_prefix_cache()
            started = time.perf_counter()
            results = llm.generate(prompts, params)
            seconds.append(time.perf_counter() - started)
        failed = next((result.error for result in results if result.error), None)
        if failed:
            raise MinisglError(f"the workload does not fit the model: {failed}")
        usage = [result.usage for result in results]
        median = statistics.median(seconds)
        output_tokens = sum(one.completion_tokens for one in usage)
        prompt_tokens = sum(one.prompt_tokens for one in usage)
        row = {
            "bench": "throughput",
            "model": model,
            "workload": workload,
            "output_tokens_per_s": round(output_tokens / median, 1),
            "input_tokens_per_s": round(prompt_tokens / median, 1),
            "seconds": round(median, 4),
            "seconds_all": [round(value, 4) for value in seconds],
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "cached_tokens": sum(one.cached_tokens for one in usage),
            "preemptions": llm.scheduler.num_preemptions,
            "ready_s": round(ready_s, 2),
            "dtype": llm.config.dtype,
            "options": {name: value for name, value in options.items() if name != "device"},
            **environment(llm.engine.device),
        }
    if json_path:
        write_rows(json_path, [row])
    return row
