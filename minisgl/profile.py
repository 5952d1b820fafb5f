"""Where a step's time goes: a trace of some steps, and a table of their kernels.

    with trace("profile", device) as step_done:
        while llm.num_unfinished:
            llm.step()
            step_done()

Writes trace.json (open it in https://ui.perfetto.dev or chrome://tracing) and kernels.txt into the folder.
Knows torch's profiler. Does not know what a step is: the caller says when one ended.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minisgl.errors import MinisglError

STEPS = 20  # enough to average over, and a trace of some megabytes
MAX_KERNELS = 30


class StepTrace:
    """Call it after each step: it traces `steps` of them after the first `skip`, and writes the files."""

    def __init__(self, folder: Path, device: torch.device, skip: int, steps: int) -> None:
        self.folder = folder
        self._device, self._first, self._end = device, skip, skip + steps
        self._done = self._num_traced = 0
        self._profiler: Any = None
        self._started = 0.0
        if skip == 0:
            self._start()

    def __call__(self) -> None:
        self._done += 1
        if self._done == self._end:
            self.finish()
        elif self._done == self._first:
            self._start()

    def _start(self) -> None:
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._synchronize()
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._started = perf_counter()

    def finish(self) -> None:
        """Write what was traced; nothing the second time. MinisglError when there were too few steps to trace any."""
        if (profiler := self._profiler) is not None:
            self._synchronize()
            seconds = perf_counter() - self._started
            self.stop()
            self._num_traced = self._done - self._first
            if self._num_traced:
                profiler.export_chrome_trace(str(self.folder / "trace.json"))
                table = kernel_table(profiler.events(), seconds, self._num_traced, self._device.type)
                (self.folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
        if not self._num_traced:
            raise MinisglError(f"nothing was traced: of {self._done} steps the first {self._first} are skipped")

    def stop(self) -> None:
        """Trace no more, and write nothing: a profiler that goes on keeps a record of each operator."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def trace(folder: str | Path, device: torch.device, *, skip: int = 0, steps: int = STEPS) -> Iterator[StepTrace]:
    """Trace `steps` steps after the first `skip`, or those that there are; yields what to call after each step.

    Raises MinisglError when the steps ended before the first traced one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step_done = StepTrace(folder, device, skip, steps)
    try:
        yield step_done
        step_done.finish()
    finally:
        step_done.stop()


def kernel_table(events: Any, seconds: float, num_steps: int, device_type: str) -> str:
    """Kernels (on a CPU: operators) by time per step, from a profiler's `events()` of steps that took `seconds`.

    A kernel that starts while others run, to be ready when they end (see kernels/dependent_launch.py), counts from
    where they end: what the sum falls short of the wall time is time the device waited.
    """
    on_gpu = device_type == "cuda"
    time_us: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ended = 0.0
    of_device = (event for event in events if event.device_type.name == device_type.upper())
    for event in sorted(of_device, key=lambda event: event.time_range.start):
        alone = event.time_range.end - max(event.time_range.start, ended)
        time_us[event.name] += max(0.0, alone) if on_gpu else event.self_cpu_time_total
        counts[event.name] += 1
        ended = max(ended, event.time_range.end)
    rows = [(us, counts[name], name) for name, us in time_us.most_common()]
    wall_us, busy_us = seconds * 1e6 / num_steps, sum(us for us, _, _ in rows) / num_steps
    what = "kernels" if on_gpu else "operators"
    lines = [
        f"{num_steps} steps of {wall_us:,.0f} us; {what} take {busy_us:,.0f} us of each ({busy_us / wall_us:.0%})",
        f"{'us/step':>10}  {'share':>6}  {'per step':>8}  {what}",
    ]
    for us, count, key in rows[:MAX_KERNELS]:
        lines.append(f"{us / num_steps:>10,.1f}  {us / num_steps / wall_us:>6.1%}  {count / num_steps:>8.1f}  {key}")
    if len(rows) > MAX_KERNELS:
        rest_us = sum(us for us, _, _ in rows[MAX_KERNELS:]) / num_steps
        lines.append(f"{rest_us:>10,.1f}  {rest_us / wall_us:>6.1%}  {'':>8}  {len(rows) - MAX_KERNELS} others")
    return "\n".join(lines)
