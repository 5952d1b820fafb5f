"""Time kernels beside their floor: `minisgl bench kernels [OP]...`.

An op has a file of its name here and in kernels/; the one here has `cases(device) -> Iterator[Case]`, `tunings` if its
tiles can be tuned (tuning.py), and ARCHITECTURES if not all have the kernel.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minisgl.bench.harness import ceilings, measure, table, write_rows
from minisgl.errors import MinisglError
from minisgl.kernels import launch


def available_ops() -> list[str]:
    """Names of the ops that can be measured."""
    kernels = Path(launch.__file__).parent
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if (kernels / path.name).exists())


def bench_module(op: str) -> Any:
    """The module that measures an op."""
    return import_module(f"minisgl.bench.{op}")


def choose_ops(named: list[str], known: list[str], device: torch.device) -> list[str]:
    """The ops that are named, or all known ones that the device has. Raises MinisglError for one that it has not."""
    here = launch.architecture(device)
    elsewhere = {op for op in known if here not in getattr(bench_module(op), "ARCHITECTURES", (here,))}
    for op in named:
        if op in elsewhere:
            only = ", ".join(bench_module(op).ARCHITECTURES)
            raise MinisglError(f"the kernel of {op} is for {only} alone, and {device} is {here}: leave the op out")
    return named or [op for op in known if op not in elsewhere]


def run(
    ops: list[str],
    device: str | torch.device = "auto",
    json_path: Path | str | None = None,
    plot_path: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure the named ops, or all of them; print a table, append the rows to `json_path`, draw them into `plot_path`
    and return them.

    Raises MinisglError without a GPU, for an op that is unknown or not for this GPU, and for a plot without matplotlib.
    """
    known = available_ops()
    unknown = next((op for op in ops if op not in known), None)
    if unknown is not None:
        raise MinisglError(f"no bench for the op {unknown!r}: known are {', '.join(known)}")
    device = open_gpu(device, "bench kernels")
    ops = choose_ops(ops, known, device)
    if plot_path:
        from minisgl.bench.plots import roofline  # first of all: without matplotlib nothing is measured in vain
    if json_path is not None:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    limits = ceilings(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: copy {limits.copy_gb_s:.0f} GB/s, bf16 matmul {limits.matmul_tflops:.0f} TFLOP/s")
    rows = []
    for op in ops:
        of_op = [measure(case, device) for case in bench_module(op).cases(device)]
        print("\n" + table(of_op), flush=True)
        if json_path is not None:
            write_rows(json_path, of_op)
        rows += of_op
    if plot_path:
        roofline(rows, plot_path)
        print(f"\n{plot_path}")
    return rows


def open_gpu(device: str | torch.device, what: str) -> torch.device:
    """The GPU to measure, made torch's current one. Raises MinisglError without a GPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise MinisglError(f"{what} needs a GPU, but the device is {device}: run it where there is one")
    device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device
