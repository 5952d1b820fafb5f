"""Shared test set-up: where kernels run, and how results are compared.

With no GPU, the interpreter of Triton is switched on for the whole session (it is chosen when a kernel is decorated).
Tests in tests/kernels run the kernels through it; every other test runs the engine's CPU path, which is the torch
references.
"""

import os

import pytest
import torch

torch.set_num_threads(1)  # workers of pytest-xdist share the cores
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from minisgl.kernels import launch  # noqa: E402

launch.INTERPRET = False  # fixtures of modules run before `_kernel_path`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _kernel_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors run the interpreter in tests/kernels and in tests marked `interpreter`, references elsewhere."""
    interpreted = "tests/kernels" in request.path.as_posix() or request.node.get_closest_marker("interpreter")
    monkeypatch.setattr(launch, "INTERPRET", bool(interpreted) and not HAS_GPU)
