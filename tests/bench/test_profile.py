"""Traces of steps: which ones, and what the table makes of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from minisgl.errors import MinisglError
from minisgl.profile import kernel_table, trace

CPU = torch.device("cpu")


def run(folder: Path, num_steps: int, **plan: int) -> str:
    with trace(folder, CPU, **plan) as step_done:
        for step in range(num_steps):
            torch.ones(8, 8) @ torch.ones(8, 8) if step < 3 else torch.ones(8).cumsum(0)
            step_done()
    return (folder / "kernels.txt").read_text()


def test_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    first = run(tmp_path / "first", 9, skip=0, steps=3)
    assert first.startswith("3 steps of") and "aten::mm" in first and "cumsum" not in first
    later = run(tmp_path / "later", 9, skip=3, steps=4)
    assert later.startswith("4 steps of") and "aten::mm" not in later and "cumsum" in later
    assert (tmp_path / "later" / "trace.json").stat().st_size


def test_fewer_steps_than_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path, 5, skip=3, steps=100).startswith("2 steps of")


@pytest.mark.parametrize("skip", [5, 6])
def test_no_step_to_trace(skip: int, tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match=f"of 5 steps the first {skip} are skipped"):
        run(tmp_path, 5, skip=skip)


def test_the_error_of_a_step_is_the_one_that_shows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a step failed"), trace(tmp_path, CPU):
        raise ValueError("a step failed")
    assert not torch.autograd._profiler_enabled() and not list(tmp_path.iterdir())


def test_kernels_by_time_per_step() -> None:
    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    kernels = [
        event("matmul", 500, 700),
        event("norm", 100, 200),
        event("matmul", 150, 400),  # launched early: it waits for the norm
        event("norm", 550, 650),  # beside a longer one
        event("a launch", 0, 9e9, DeviceType.CPU),
    ]
    lines = kernel_table(kernels, 2000e-6, 2, "cuda").splitlines()
    assert lines[0] == "2 steps of 1,000 us; kernels take 250 us of each (25%)"
    assert [line.split() for line in lines[2:]] == [
        ["200.0", "20.0%", "1.0", "matmul"],
        ["50.0", "5.0%", "1.0", "norm"],
    ]
    many = [event(f"k{place}", 10 * place, 10 * place + 10) for place in range(33)]
    assert kernel_table(many, 1, 1, "cuda").splitlines()[-1].split()[-2:] == ["3", "others"]
