"""What was asked becomes what runs, or an error that names what is accepted."""

import pytest
import torch

from minisgl.errors import MinisglError
from minisgl.resolve import resolve_device


def test_devices_of_any_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(MinisglError, match="torch sees no GPU: use --device cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["", "cpu:0", "cpu:3", "meta", "mps", "gpu", "cuda:", "cuda:x", "cuda:-1"])
def test_other_devices_are_refused(name):
    with pytest.raises(MinisglError, match="it must be auto, cpu, cuda or cuda:N"):
        resolve_device(name)
