"""`minisgl info`: what a bug report needs. Collects facts and prints them; loads no model."""

import importlib.metadata
import json
import os
import platform
from typing import Any

import click

import minisgl
from minisgl.cli.options import OneLineErrors

EXAMPLES = """\b
Examples:
  minisgl info
  minisgl info --json
"""


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Print versions, devices and the kernel path.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Print versions, devices, memory and which kernel path will run: paste it into a bug report."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for section, value in facts.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            click.echo(f"{section:<12} {_line(row)}")


def collect() -> dict[str, Any]:
    """All facts, as JSON types. Memory is in GiB."""
    return {
        "minisgl": minisgl.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "os": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "memory_gib": _host_memory_gib(), "kernels": _cpu_path()},
        "gpu": _gpus(),
        "demo_model": _demo_model(),
    }


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _host_memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _cpu_path() -> str:
    from minisgl.kernels import launch

    return "Triton interpreter (TRITON_INTERPRET=1)" if launch.INTERPRET else "torch references"


def _gpus() -> list[dict[str, Any]] | str:
    import torch

    from minisgl.kernels import launch

    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        return f"none: no device is visible to torch (built for {build})" if build else "none: torch is a CPU build"
    gpus = []
    for place in range(torch.cuda.device_count()):
        device = torch.device("cuda", place)
        free, total = torch.cuda.mem_get_info(device)
        gpus.append(
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device),
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
                "kernels": f"Triton on {launch.architecture(device)}{_gluon(device)}",
            }
        )
    return gpus


def _gluon(device: Any) -> str:
    from minisgl.kernels import launch

    if launch.architecture(device) != "sm_90":
        return ""
    found = all(launch.hopper_module(name, device) for name in launch.HOPPER_MODULES)
    return " with Gluon" if found else " without Gluon: this Triton has another"


def _demo_model() -> str:
    from minisgl.demo import MODEL_PATH

    weights = sorted(MODEL_PATH.glob("*.safetensors"))
    if not weights:
        return f"missing from {MODEL_PATH}: install minisgl again"
    return f"{MODEL_PATH} ({sum(path.stat().st_size for path in weights) / 1e6:.1f} MB)"
