"""Help, version and info: what the commands say."""

import json
from dataclasses import fields

import pytest

import minisgl
from minisgl.cli.bench import bench
from minisgl.cli.main import main
from minisgl.config import EngineConfig
from tests.cli.conftest import Invoke

COMMANDS = [[], *([name] for name in main.commands), *(["bench", name] for name in bench.commands), ["eval", "compare"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples(invoke: Invoke, command: list[str]) -> None:
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    examples = done.output.split("Examples:")[1]
    assert " ".join(["minisgl", *command]) in examples


def test_every_engine_setting_is_a_flag(invoke: Invoke) -> None:
    for command in (["run"], ["bench", "throughput"], ["bench", "latency"]):
        help = invoke(*command, "--help").output
        for setting in fields(EngineConfig):
            assert "--" + setting.name.replace("_", "-") in help


def test_version(invoke: Invoke) -> None:
    assert minisgl.__version__ in invoke("--version").output


def test_info(invoke: Invoke) -> None:
    done = invoke("info")
    assert done.exit_code == 0
    for name in ("minisgl", "python", "torch", "triton", "transformers", "os", "cpu", "gpu", "demo_model"):
        assert name in done.stdout
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["minisgl"] == minisgl.__version__
    assert facts["cpu"]["kernels"] == "torch references"
    assert facts["cpu"]["memory_gib"] > 0


def test_info_on_gpus(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from minisgl.kernels import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "hopper_module", lambda name, device: device.index and name)
    gpus = json.loads(invoke("info", "--json").stdout)["gpu"]
    assert gpus[1] == {
        "device": "cuda:1",
        "name": "A card",
        "memory_gib": 80.0,
        "free_gib": 1.0,
        "kernels": "Triton on sm_90 with Gluon",
    }
    assert "Triton on sm_90 without Gluon: this Triton has another" in invoke("info").stdout
