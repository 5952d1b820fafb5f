"""Hopper's own kernels load with each Triton that has what they need, and are missed aloud with others."""

from types import SimpleNamespace

import pytest
import torch

from minisgl.kernels import launch
from minisgl.kernels.hopper import first_name


def test_the_first_name_that_is_there():
    old, new = SimpleNamespace(_reinterpret=1), SimpleNamespace(_reinterpret=1, reinterpret=2)
    assert first_name(old, "reinterpret", "_reinterpret") == 1
    assert first_name(new, "reinterpret", "_reinterpret") == 2
    with pytest.raises(AttributeError, match="reinterpret"):
        first_name(SimpleNamespace(), "reinterpret", "_reinterpret")


@pytest.mark.parametrize("name", launch.HOPPER_MODULES)
def test_they_load_with_this_triton(name, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    assert launch.hopper_module.__wrapped__(name, torch.device("cuda")) is not None


def test_another_gluon_is_a_warning(monkeypatch, caplog):
    def fail(name):
        raise AttributeError("tma has no async_load")

    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "import_module", fail)
    assert launch.hopper_module.__wrapped__("matmul_sm90", torch.device("cuda")) is None
    assert "matmul_sm90 does not load with this Triton" in caplog.text and "async_load" in caplog.text
