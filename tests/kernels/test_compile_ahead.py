"""Kernels that launches of nothing have named are compiled when they are launched for something."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from minisgl.kernels.compile_ahead import compile_ahead

ROOT = Path(__file__).parents[2]


def test_compiles_each_kernel_once_and_launches_nothing():
    """In a process of its own: the interpreter is on in this one, where there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "launch_ahead.py")]
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert ast.literal_eval(result.stdout) == {
        "launches inside": 0,
        "compiled ahead": 2,
        "launchers ahead": 2,
        "compiled": 3,
        "launchers": 3,
        "launches": 4,
        "error ahead": 1,
        "error behind": 1,
    }


@triton.jit
def _add_one(x_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@pytest.mark.gpu
def test_runs_behind_it(monkeypatch):
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **options: compiled.append(options["key"]))
    x = torch.zeros(64, device="cuda")
    for again in range(2):  # then all is compiled, and runs nothing either
        with compile_ahead(x.device):
            for size in (16, 64, 16):
                _add_one[(1,)](x, SIZE=size)
        assert len(compiled) == 2 and x.tolist() == [3.0 * again] * 16 + [1.0 * again] * 48
        for size in (16, 64, 16):
            _add_one[(1,)](x, SIZE=size)
        assert len(compiled) == 2
