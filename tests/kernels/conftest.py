"""Kernel tests: each runs where it can, compares with float64, and poisons what the kernel must overwrite."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# The interpreter computes bf16 wrongly without saying so; bf16 is tested on a GPU.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_GPU else [torch.float32, torch.float16]
RELATIVE_ERROR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU every kernel test is a GPU test."""
    if HAS_GPU:
        for item in items:
            if "tests/kernels" in item.path.as_posix() and "test_aot" not in item.path.name:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """A test draws the same values in every run: the errors of a few rounded sums may be above their usual bound."""
    torch.manual_seed(crc32(request.node.name.encode()))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates starts as NaN, so that an element that the kernel leaves out is seen."""

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        return torch.full(shape, float("nan"), **options)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """`assert_close(out, expected)`: norm-wise relative error against a float64 reference; NaN never passes."""

    def compare(out: torch.Tensor, expected: torch.Tensor) -> None:
        assert out.shape == expected.shape
        wide, truth = out.double(), expected.double()
        error = (wide - truth).norm() / truth.norm().clamp_min(1e-30)
        limit = RELATIVE_ERROR[out.dtype]
        assert error <= limit, f"relative error {error:.2e} is above {limit:.0e} for {out.dtype}"

    return compare
