"""Help, version, info and bench: what the commands say and what they call."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minisgl
from minisgl.config import EngineConfig
from tests.cli.conftest import Invoke

COMMANDS = [[], ["run"], ["info"], ["bench"], ["bench", "throughput"], ["bench", "kernels"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples(invoke: Invoke, command: list[str]) -> None:
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    examples = done.output.split("Examples:")[1]
    assert " ".join(["minisgl", *command]) in examples


def test_every_engine_setting_is_a_flag(invoke: Invoke) -> None:
    for command in (["run"], ["bench", "throughput"]):
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
    gpus = json.loads(invoke("info", "--json").stdout)["gpu"]
    assert gpus[1] == {
        "device": "cuda:1",
        "name": "A card",
        "memory_gib": 80.0,
        "free_gib": 1.0,
        "kernels": "Triton on sm_90",
    }
    assert "Triton on sm_90" in invoke("info").stdout


def test_bench_throughput(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(model: str, workload: str, **options: Any) -> dict[str, Any]:
        calls.append((model, workload, options))
        return {"output_tokens_per_s": 12}

    monkeypatch.setitem(sys.modules, "minisgl.bench.throughput", SimpleNamespace(run=run))
    done = invoke(
        "bench", "throughput", "--workload", "single", "--repeats", "2", "--json", "x.json", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.output
    assert calls == [("qwen3-0.6b", "single", {"repeats": 2, "json_path": Path("x.json"), "dtype": "float32"})]
    assert "output_tokens_per_s" in done.stdout
    invoke("bench", "throughput", "-m", "other")
    assert calls[1] == ("other", "mini", {"repeats": 3, "json_path": None})


def test_bench_kernels(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "minisgl.bench.kernels", SimpleNamespace(run=lambda *args: calls.append(args)))
    assert invoke("bench", "kernels", "rms_norm", "--device", "cpu").exit_code == 0
    assert invoke("bench", "kernels").exit_code == 0
    assert calls == [(["rms_norm"], "cpu", None), ([], "auto", None)]
