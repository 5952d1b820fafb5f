"""Every command and program in the README works; the set-up lines are what CI runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisgl.demo import MODEL_PATH

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CALLS = ("RequestError", "_refuse", "refuse", "row_error")  # their arguments name error types
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && "

needs_demo_model = pytest.mark.skipif(
    not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights"
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def needs_gpu(command: str) -> bool:
    return command.startswith("minisgl bench") and "demo" not in command


def commands() -> list[object]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith(SET_UP)]
    return [pytest.param(line, marks=pytest.mark.gpu) if needs_gpu(line) else line for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder where the README's paths exist and `minisgl` is this checkout's."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*.results.jsonl*"))
    shutil.copytree(MODEL_PATH, tmp_path / "minisgl" / "demo" / "model")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "minisgl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "minisgl"}" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """Run in the README's folder, as a user would: without Triton's interpreter. Returns stdout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start_is_two_lines() -> None:
    section = README.split("## Quick start\n")[1].split("\n## ")[0]
    found = re.findall(r"^```.*?^```$", section, re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    first, second = blocks("bash", section)
    assert first == SET_UP + "pip install -e . && minisgl run examples/prompts.jsonl\n"
    assert second.startswith(SET_UP)


def test_ci_runs_what_the_readme_says() -> None:
    set_up_and_test = blocks("bash")[1].removeprefix(SET_UP).strip().split(" && ")
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert steps.index("pip install torch==2.13.0") < steps.index(set_up_and_test[0])
    assert [step for step in steps if step in set_up_and_test] == set_up_and_test


def test_contributing_has_the_checks_of_ci() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for step in (ROOT / ".ci" / "run").read_text().splitlines():
        if step.startswith(("ruff", "mypy", "pytest")):
            assert step in contributing


@needs_demo_model
def test_the_quick_start_answers_every_prompt(folder: Path) -> None:
    run(["minisgl", "run", "examples/prompts.jsonl"], folder)
    prompts = (folder / "examples" / "prompts.jsonl").read_text().splitlines()
    assert len((folder / "examples" / "prompts.results.jsonl").read_text().splitlines()) == len(prompts)


@needs_demo_model
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme(command: str, folder: Path) -> None:
    share = " --memory-fraction 0.2" if needs_gpu(command) and "throughput" in command else ""
    run(["bash", "-o", "pipefail", "-c", command + share], folder)


@needs_demo_model
@pytest.mark.parametrize("program", blocks("python"))
def test_a_program_of_the_readme(program: str, folder: Path) -> None:
    assert run([sys.executable, "-c", program], folder)


def test_the_gpu_figure_is_a_measured_one() -> None:
    rows = map(json.loads, (ROOT / "bench" / "results" / "throughput.jsonl").read_text().splitlines())
    measured = {f"{row['output_tokens_per_s']:,.0f}" for row in rows if row["workload"] == "mini"}
    assert set(re.findall(r"run at ([\d,]+) output tokens/s", README)) <= measured


def test_every_error_type_is_in_the_readme() -> None:
    types = set()
    for path in (ROOT / "minisgl").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in CALLS:
                texts = [getattr(argument, "value", None) for argument in call.args]
                types |= {text for text in texts if re.fullmatch(r"[a-z]+(_[a-z]+)+", str(text))}
    listed = README.split("Error types:")[1].split(".")[0]
    assert types | {"invalid_row", "invalid_request"} == set(re.findall(r"`(\w+)`", listed))  # two are defaults
