"""Compile every kernel for one target, with no GPU: `python tests/kernels/aot_compile.py cuda:90 [OP...]`.

Each tests/kernels/aot/<op>.py has a `launch()` that calls the op's public launcher at the shapes and dtypes of its tile
table. Here a stub driver names the target and every launch is turned into a compilation, so that what is compiled is
exactly what a launch would compile: specialisation, tile and options included. ARCHITECTURES in it says which ones have
the op; without, all do.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from minisgl.kernels import launch

HERE = Path(__file__).parent
ARCHITECTURES = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "cuda:120": GPUTarget("cuda", 120, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


class StubDriver:
    """What triton asks of a driver before it compiles; nothing that launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(name: str, ops: list[str]) -> None:
    target = ARCHITECTURES[name]
    compiled: set[str] = set()
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        options["warmup"] = True
        kernel = run(self, *args, **options)
        compiled.add(kernel.hash)
        return kernel

    driver.set_active(StubDriver(target))
    jit.JITFunction.run = compile_only
    # Launchers ask these two; CPU tensors stand in for the target's.
    launch.INTERPRET = True
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    launch.architecture.cache_clear()
    launch_architecture = lambda device: arch  # noqa: E731
    launch.architecture = launch_architecture
    for path in sorted((HERE / "aot").glob("*.py")):
        if ops and path.stem not in ops:
            continue
        spec = importlib.util.spec_from_file_location(f"aot_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        before = len(compiled)
        if arch in getattr(module, "ARCHITECTURES", [arch]):
            module.launch()
            assert len(compiled) > before, f"{path.name} compiled nothing"
        print(f"{name} {path.stem}: {len(compiled) - before} kernels")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
