"""The command line as a process: signals, pipes, start-up time. The engine is the stand-in of tests/batch_run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# minisgl with FakeLLM for its engine; a step takes STEP_S and the exit 200 ms, so that there is time to interrupt them.
# Where the tests run in the background of a script, SIGINT is ignored, and children inherit that: it is switched on.
PROGRAM = """
    import atexit, os, signal, sys, time, types
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tests.batch_run.fake_llm import FakeLLM

    class SlowLLM(FakeLLM):
        def step(self):
            time.sleep(float(os.environ["STEP_S"]))
            return super().step()

    sys.modules["minisgl.llm"] = types.SimpleNamespace(LLM=SlowLLM)
    from minisgl.batch_run import job
    job.revision, job.resolved_dtype = (lambda model: "as it was"), (lambda model, engine: "float32")
    atexit.register(time.sleep, 0.2)
    from minisgl.cli.main import main
    main()
"""


def wait_for_rows(results: Path) -> None:
    deadline = time.monotonic() + 60
    while not (results.exists() and results.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture
def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**env, "PYTHONPATH": str(ROOT), "STEP_S": "0.02"}


@pytest.fixture
def many_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{index}"}}\n' for index in range(5000)))
    return path


def start(*args: object, env: dict[str, str], **streams: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, args)]
    return subprocess.Popen(command, env=env, **{"stderr": subprocess.PIPE, **streams})


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_what_runs(
    many_prompts: Path, environment: dict[str, str], signum: signal.Signals, code: int
) -> None:
    results = many_prompts.with_name("prompts.results.jsonl")
    process = start("run", many_prompts, env=environment)
    wait_for_rows(results)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    rows = [json.loads(line) for line in results.read_bytes().splitlines()]
    assert 0 < len(rows) < 5000
    said = err.splitlines()
    assert said[-2].startswith(b"Finishing the rows that run") and said[-1].startswith(b"Interrupted:")
    assert b"the same command goes on from there" in said[-1] and b"Traceback" not in err


def test_ctrl_c_again_and_again(many_prompts: Path, environment: dict[str, str]) -> None:
    results = many_prompts.with_name("prompts.results.jsonl")
    process = start("run", many_prompts, env=environment)
    wait_for_rows(results)
    for _ in range(200):
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), err  # the latter late in Python's exit; 130 to a shell
    assert b"KeyboardInterrupt" not in err, err
    assert [json.loads(line) for line in results.read_bytes().splitlines()]


def test_a_reader_that_goes_away(many_prompts: Path, environment: dict[str, str]) -> None:
    process = start("run", many_prompts, "-o", "-", env=environment, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 2
    assert process.stderr
    last = process.stderr.read().splitlines()[-1]
    assert last.startswith(b"Error: stopped: cannot write stdout: Broken pipe"), last


def test_messages_that_nobody_can_read(many_prompts: Path, environment: dict[str, str]) -> None:
    """The log's disk is full, or its reader has left: the job goes on."""
    lines, few = many_prompts.read_text().splitlines(keepends=True), many_prompts.with_name("few.jsonl")
    few.write_text("".join(lines[:50]))
    reading, unread = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full, open(unread, "wb") as unread_file:
        for name, stderr in (("full", full), ("unread", unread_file)):
            results = few.with_name(f"{name}.jsonl")
            assert start("run", few, "-o", results, env=environment, stderr=stderr.fileno()).wait(60) == 0
            assert len(results.read_bytes().splitlines()) == 50


def test_stdin_that_is_the_output(many_prompts: Path, environment: dict[str, str]) -> None:
    before = many_prompts.read_bytes()
    with many_prompts.open("rb") as source, many_prompts.open("ab") as target:
        process = start("run", "-", "-o", many_prompts, env=environment, stdin=source.fileno())
        assert process.wait(timeout=60) == 2
        process = start("run", "-", env=environment, stdin=source.fileno(), stdout=target.fileno())
        assert process.wait(timeout=60) == 2
    assert many_prompts.read_bytes() == before


def test_help_does_not_import_torch(environment: dict[str, str]) -> None:
    code = "import sys; from minisgl.cli.main import main; main(['run', '--help'], standalone_mode=False); "
    code += "sys.exit(bool({'torch', 'transformers', 'triton', 'datasets', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", [["-m", "minisgl"], [str(ROOT / "minisgl")]], ids=["module", "folder"])
def test_the_ways_to_start_it(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], env=environment, capture_output=True, cwd=tmp_path)
    assert done.stdout.startswith(b"minisgl, version")
