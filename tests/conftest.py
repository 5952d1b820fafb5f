"""Shared test set-up: where kernels run, and how results are compared.

With no GPU, the interpreter of Triton is switched on for the whole session (it is chosen when a kernel is decorated).
Tests in tests/kernels run the kernels through it; every other test runs the engine's CPU path, which is the torch
references.

With a GPU, only tests marked `gpu` see it: an engine that was given no device would take most of its memory from the
other workers.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # workers of pytest-xdist share the cores
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
is_available, visible_devices = torch.cuda.is_available, os.environ.get("CUDA_VISIBLE_DEVICES")
HAS_GPU = is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from minisgl.kernels import launch  # noqa: E402

GPU_BYTES_OF_A_WORKER = 5 << 30  # what a process takes beside the largest tests

launch.INTERPRET = False  # fixtures of modules run before `_kernel_path`
if not HAS_GPU:
    from tests import interpreter

    interpreter.patch_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Of `-n auto` on a machine with a GPU: as many as it has cores, and as the GPU's memory holds."""
    if not HAS_GPU:
        return None  # pytest-xdist's own choice
    return max(1, min(os.cpu_count() or 1, torch.cuda.get_device_properties(0).total_memory // GPU_BYTES_OF_A_WORKER))


@pytest.hookimpl(trylast=True)  # after fixtures of any scope
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Leave the GPU's memory to other workers."""
    if HAS_GPU and item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Show the GPU, to this process and to those it starts, or hide it."""
    if not HAS_GPU:
        return
    sees_gpu = item.get_closest_marker("gpu") is not None
    torch.cuda.is_available = is_available if sees_gpu else lambda: False
    if not sees_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif visible_devices is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model(name) -> folder of that checkpoint, made once a session; do not write to it."""
    from tests.tiny_models import make

    return cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def _kernel_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors run the interpreter in tests/kernels and in tests marked `interpreter`, references elsewhere."""
    interpreted = "tests/kernels" in request.path.as_posix() or request.node.get_closest_marker("interpreter")
    monkeypatch.setattr(launch, "INTERPRET", bool(interpreted) and not HAS_GPU)
