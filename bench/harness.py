"""What every measurement shares: a case, how it is timed, the ceilings it is held against, and the row it leaves.

Knows devices and clocks; knows nothing of any kernel. A row says on what, when, and from which commit it was measured.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

import minisgl
from minisgl.kernels.launch import architecture

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One op at one shape, ready to run."""

    op: str
    shape: str  # for people: "64 x 4096"
    run: Callable[[], object]
    baselines: dict[str, Callable[[], object]]  # name: the same work done otherwise
    bytes_moved: int  # that the op cannot avoid
    flops: int = 0  # 0: bound by memory alone


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches on the two simplest things."""

    copy_gb_s: float  # reads and writes of a large copy together
    matmul_tflops: float  # bf16


def time_us(run: Callable[[], object]) -> float:
    """Median microseconds of a launch, with the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median")) * 1e3


def graph_time_us(run: Callable[[], object]) -> float:
    """Median microseconds of a launch inside a CUDA graph of many, as decode runs it; data that fits stays in L2."""
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(run, return_mode="median")) * 1e3
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # a capture that fails keeps the generator to itself
        raise


@cache
def ceilings(device: torch.device) -> Ceilings:
    """Measure the device's ceilings, once a process."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device=device)  # zeros would draw less power
    target = torch.empty_like(source)
    size = 8192
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device).unbind()
    copy_us, matmul_us = time_us(lambda: target.copy_(source)), time_us(lambda: a @ b)
    return Ceilings(2 * source.numel() / copy_us / 1e3, 2 * size**3 / matmul_us / 1e6)


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" behind it where files have changed since; where there is no .git, what
    MINISGL_COMMIT says, or None."""
    if "MINISGL_COMMIT" in os.environ:
        return os.environ["MINISGL_COMMIT"]
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when a row was measured; part of every row."""
    try:
        from triton import __version__ as triton_version
    except ImportError:  # Triton is for Linux alone
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "architecture": architecture(device),
        "commit": commit(),
        "versions": {
            "minisgl": minisgl.__version__,
            "torch": torch.__version__,
            "triton": triton_version,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Time a case and its baselines on a GPU; a plain row. `share` is of the ceiling that bounds the op."""
    us = time_us(case.run)
    limits = ceilings(device)
    gb_s = case.bytes_moved / us / 1e3
    tflops = case.flops / us / 1e6
    row = {
        "bench": "kernels",
        "op": case.op,
        "shape": case.shape,
        "us": round(us, 2),
        "graph_us": round(graph_time_us(case.run), 2),
        "gb_s": round(gb_s, 1),
        "tflops": round(tflops, 2) if case.flops else None,
        "share": round(max(gb_s / limits.copy_gb_s, tflops / limits.matmul_tflops), 3),
    }
    eager = {name: _attempt(name, time_us, run) for name, run in case.baselines.items()}
    works = {name: us for name, us in eager.items() if us is not None}
    graphs = {name: _attempt(f"{name}, in a graph", graph_time_us, case.baselines[name]) for name in works}
    return {
        **row,
        "baselines_us": works,
        "baselines_graph_us": {name: us for name, us in graphs.items() if us is not None},
        "ceilings": {"copy_gb_s": round(limits.copy_gb_s, 1), "matmul_tflops": round(limits.matmul_tflops, 1)},
        **environment(device),
    }


def _attempt(name: str, timer: Callable[[Callable[[], object]], float], run: Callable[[], object]) -> float | None:
    """Microseconds of a baseline; None, and a line on stderr, where it does not run: what is installed differs."""
    try:
        return round(timer(run), 2)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"no baseline {name}: {type(error).__name__}: {reason}", file=sys.stderr)
        return None


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `measure` as text; a baseline is followed by how many times longer it took."""
    lines = [("op", "shape", "us", "graph us", "GB/s", "TFLOP/s", "of ceiling", "baselines: us, graph us")]
    for row in rows:
        tflops = "-" if row["tflops"] is None else f"{row['tflops']:.1f}"
        figures = (f"{row['us']:.1f}", f"{row['graph_us']:.1f}", f"{row['gb_s']:.0f}", tflops, f"{row['share']:.0%}")
        baselines = "; ".join(_baseline(row, name) for name in row["baselines_us"])
        lines.append((row["op"], row["shape"], *figures, baselines))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _baseline(row: dict[str, Any], name: str) -> str:
    us, graph_us = row["baselines_us"][name], row["baselines_graph_us"].get(name)
    text = f"{name} {us:.1f} ({us / row['us']:.2f}x)"
    return text if graph_us is None else f"{text}, {graph_us:.1f} ({graph_us / row['graph_us']:.2f}x)"
