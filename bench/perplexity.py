"""Memory and time of a long text's logprobs: `minisgl bench perplexity`.

A text of random token ids is read once without scores, so that every KV page it needs is in use, then once more, then
with the logprob of each token. Peaks are of the last two, beyond what the engine held before: of the device's allocator
on a GPU, of the process (Linux's VmHWM) on a CPU. Beside them stands what the logits of the whole text would take.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minisgl.bench.engines import find_model, shown
from minisgl.bench.harness import environment, write_rows
from minisgl.errors import MinisglError
from minisgl.llm import LLM
from minisgl.request import SamplingParams

RESET_PEAK = "5"  # of /proc/PID/clear_refs; see proc_pid_clear_refs(5)


def run(
    model: str, *, tokens: int = 8192, layers: int | None = None, json_path: Path | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """One row. layers: make random weights of the model's shape with as many layers. Other arguments as in
    `throughput.run`. MinisglError for a text that the model cannot hold."""
    folder, options = find_model(model, options)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    with TemporaryDirectory() as place:
        if layers:
            config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
            (Path(place) / "config.json").write_text(json.dumps(config))
            folder, options = Path(place), {"load_format": "dummy", **options}
        llm = LLM(folder, **options)
    with llm:
        vocab_size, device = llm.model_config.vocab_size, torch.device(llm.config.device)
        rng = Random(0)
        ids = [rng.randrange(vocab_size) for _ in range(tokens)]

        def read() -> None:
            llm.reset_prefix_cache()
            [result] = llm.generate([ids[:-1]], SamplingParams(max_tokens=1, temperature=0))
            if result.error:
                raise MinisglError(f"the text does not fit the model: {result.error}")

        def score() -> None:
            llm.reset_prefix_cache()
            [scored] = llm.score([ids[:1]], [ids[1:]])
            assert scored.error is None and scored.num_tokens == tokens - 1

        read()
        (read_bytes, _), (score_bytes, seconds) = (_peak(work, device) for work in (read, score))
        row = {
            "bench": "perplexity",
            "model": model,
            "layers": llm.model_config.num_layers,
            "tokens": tokens,
            "vocab_size": vocab_size,
            "read_mb": round(read_bytes / 1e6, 1),
            "scored_mb": round(score_bytes / 1e6, 1),
            "all_logits_mb": round(tokens * vocab_size * 4 / 1e6, 1),
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "dtype": llm.config.dtype,
            "options": shown(options),
            **environment(device),
        }
    if json_path:
        write_rows(json_path, [row])
    yield row


def _peak(work: Callable[[], None], device: torch.device) -> tuple[int, float]:
    """(most bytes that the work takes beyond those before it, its seconds)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = torch.cuda.memory_allocated(device) if on_gpu else _of_process("VmRSS")
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _of_process("VmHWM")
    return peak - before, seconds


def _of_process(name: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['tokens']:,} tokens, vocabulary {row['vocab_size']:,}"
    lines = [f"{row['model']}, {row['layers']} layers, {head}, {row['dtype']}, {row['device']}"]
    lines.append(f"  {'read':<9} {row['read_mb']:,.1f} MB")
    lines.append(f"  {'scored':<9} {row['scored_mb']:,.1f} MB; all logits in fp32 are {row['all_logits_mb']:,.1f} MB")
    lines.append(f"  {'tokens/s':<9} {row['tokens_per_s']:,.1f} scored, {row['seconds']:.3f} s")
    return "\n".join(lines)
