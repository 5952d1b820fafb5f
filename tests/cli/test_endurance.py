"""What people trust with a night's work: kills at random moments, full disks, a million rows, thousands of bad ones."""

import json
import random
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.rows import Record
from minisgl.batch_run.runner import BatchRun
from minisgl.demo import MODEL_PATH
from minisgl.request import SamplingParams
from tests.batch_run.test_runner import Lines
from tests.cli.conftest import read_rows
from tests.cli.test_process import ROOT, environment, start

__all__ = ["environment"]

Process = subprocess.Popen[bytes]

needs_demo_model = pytest.mark.skipif(
    not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights"
)


def kill_at_random_moments(
    begin: Callable[[], Process], journal: Path, longest_s: float, seed: int, num_kills: int
) -> None:
    """Begin num_kills times, and kill the process each time at a random moment after it has written a row."""
    rng = random.Random(seed)
    for _ in range(num_kills):
        before = journal.stat().st_size if journal.exists() else 0
        process = begin()
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.stat().st_size > before):
            assert process.poll() is None and time.monotonic() < deadline, "it should be writing rows"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, longest_s))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv"])
def test_sigkill_at_random_moments(tmp_path: Path, environment: dict[str, str], output: str) -> None:
    environment["STEP_S"] = "0.01"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{index}", "id": "row {index}"}}\n' for index in range(2000)))
    options = ["--max-running", "8", "--max-inflight", "256"]
    undisturbed, killed = tmp_path / f"undisturbed-{output}", tmp_path / output
    assert start("run", prompts, "-o", undisturbed, *options, env={**environment, "STEP_S": "0"}).wait(120) == 0
    journal = killed if output.endswith(".jsonl") else tmp_path / f"{output}.journal.jsonl"
    kill_at_random_moments(
        lambda: start("run", prompts, "-o", killed, *options, env=environment), journal, 0.2, 7, num_kills=4
    )
    done_before = journal.read_bytes().count(b"\n")
    assert 0 < done_before < 2000
    process = start("run", prompts, "-o", killed, *options, env={**environment, "STEP_S": "0"})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"2,000 ({done_before:,} of them before)" in err.decode()
    if output.endswith(".jsonl"):
        assert read_rows(killed) == read_rows(undisturbed)
        assert [row["id"] for row in read_rows(killed)] == [f"row {index}" for index in range(2000)]
    assert sorted(killed.read_bytes().splitlines()) == sorted(undisturbed.read_bytes().splitlines())


@needs_demo_model
def test_sigkill_of_a_real_engine(tmp_path: Path, environment: dict[str, str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    rows = [{**json.loads(questions[index % len(questions)]), "id": index} for index in range(300)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    undisturbed, killed = tmp_path / "undisturbed.jsonl", tmp_path / "killed.jsonl"
    command = [sys.executable, str(ROOT / "minisgl"), "run", str(prompts), "--temperature", "0", "--device", "cpu"]
    command += ["--max-running", "16", "--max-tokens", "32", "--progress", "none", "-o"]
    subprocess.run([*command, str(undisturbed)], check=True, env=environment)
    kill_at_random_moments(
        lambda: subprocess.Popen([*command, str(killed)], env=environment), killed, 0.3, 3, num_kills=6
    )
    assert 0 < killed.read_bytes().count(b"\n") < len(rows)
    subprocess.run([*command, str(killed)], check=True, env=environment)

    def texts(path: Path) -> list[tuple[int, str]]:
        return [(row["id"], row["text"]) for row in read_rows(path)]

    assert texts(killed) == texts(undisturbed)
    assert [index for index, _ in texts(killed)] == list(range(len(rows)))


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv"])
def test_a_disk_that_fills_up(tmp_path: Path, environment: dict[str, str], output: str) -> None:
    environment["STEP_S"] = "0"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{index}"}}\n' for index in range(500)))
    for room in (10_000, 50_000):  # of each file; a limit stands for a disk, which a test has none of
        process = start(
            "run",
            prompts,
            "-o",
            tmp_path / output,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),  # noqa: B023
        )
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        last = err.splitlines()[-1].decode()
        assert "cannot write" in last and "free some space and run the same command again" in last
    assert start("run", prompts, "-o", tmp_path / output, env=environment).wait(60) == 0
    journal = tmp_path / (output if output.endswith(".jsonl") else f"{output}.journal.jsonl")
    assert [row["index"] for row in read_rows(journal)] == list(range(500))


NUM_ROWS = 1_000_000
MILLION = """
    import sys, types
    from types import SimpleNamespace
    from minisgl.config import EngineConfig
    from minisgl.request import Request, Result, Usage

    class Stub:
        config = EngineConfig("stub", max_running=256, max_len=100)
        tokenizer = SimpleNamespace(encode_batch=lambda texts: [[1, 2, 3] for _ in texts])
        def __init__(self, *args, **options): self.waiting = []
        def __enter__(self): return self
        def __exit__(self, *exception): pass
        def close(self): pass
        def check_params(self, params): pass
        num_unfinished = property(lambda self: len(self.waiting))
        def new_requests(self, ids, params, *, index, thinks): return [Request(index, ids, params, 8, frozenset())]
        def submit(self, requests): self.waiting += requests
        def step(self):
            ended, self.waiting = self.waiting[:256], self.waiting[256:]
            return [(request, Result("an answer", [4], "stop", Usage(3, 1, 0))) for request in ended]

    sys.modules["minisgl.llm"] = SimpleNamespace(LLM=Stub)
    from minisgl.batch_run import job
    job.revision, job.resolved_dtype = (lambda model: "as it was"), (lambda model, engine: "float32")
    from minisgl.cli.main import main
    try:
        main()
    finally:  # the peak since exec; what the parent's wait reports starts with the parent's own memory
        status = open("/proc/self/status").read()
        print("peak_kib", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def test_a_million_rows_in_flat_memory(tmp_path: Path, environment: dict[str, str]) -> None:
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    with prompts.open("w") as file:
        file.writelines(f'{{"prompt": "question {index}", "label": {index}}}\n' for index in range(NUM_ROWS))
    command = [sys.executable, "-c", textwrap.dedent(MILLION), "run", str(prompts), "-o", str(results)]
    for _ in range(2):  # once through, and once over a journal that has all rows
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peak_mib = int(done.stderr.split("peak_kib")[1]) / 1024
        assert peak_mib < 150, f"{peak_mib:,.0f} MiB"
    with results.open("rb") as file:
        assert sum(1 for _ in file) == NUM_ROWS


def malformed_line(rng: random.Random) -> bytes:
    """A line that no reader may take for a question."""
    good = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 4}
    text = json.dumps(good).encode()
    cut = rng.randrange(1, len(text))
    broken: list[Any] = [
        text[:cut],
        text[:cut] + bytes([rng.randrange(128, 256)]) + b'"' + text[cut:],
        bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60))).translate(None, b"\r\n \t") + b"{",
        b"[" * rng.randrange(1, 100_000),
        {**good, "prompt": "x"},
        {"prompt": rng.choice([[], {}, 1, True, ["x"]])},
        {"prompt": ""},
        {"prompt": "word " * rng.randrange(5_000, 9_000)},
        {"prompt_token_ids": [rng.choice([-1, 10**6, 2**31, 10**30, 1.5, "1", None])]},
        {"messages": rng.choice([[], "x", [1], [{"role": "robot", "content": "x"}], [{"role": "user"}]])},
        {**good, rng.choice(["max_tokens", "top_p", "temperature", "seed"]): rng.choice([-1, "x", [], {}, 1e999])},
        {**good, "temprature": 1},
        {"custom_id": "a", "url": "/v1/chat/completions", "body": rng.choice([{}, [], "x", {"messages": 1}])},
    ]
    line = rng.choice(broken)
    return line if isinstance(line, bytes) else json.dumps(line).encode()


@needs_demo_model
def test_five_thousand_malformed_lines(tmp_path: Path) -> None:
    from minisgl.llm import LLM

    rng = random.Random(0)
    good = b'{"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 4, "temperature": 0}'
    places = {0, 2500, 5002}
    lines = [good if index in places else malformed_line(rng) for index in range(5003)]
    parser = RowParser(SamplingParams())
    output: Any = Lines()
    with LLM(device="cpu", max_len=512) as llm:
        job = BatchRun(llm, output)
        summary = job.run(parser.parse(Record(index, f"line {index + 1}", line)) for index, line in enumerate(lines))
        alive = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert alive[0].error is None
    assert (summary.rows, summary.num_errors) == (5003, 5000)
    rows = {index: json.loads(line) for index, line in output.by_index.items()}
    assert len(rows) == 5003
    assert {index for index, row in rows.items() if row["error"] is None} == places
    assert {rows[index]["text"] for index in places} == {"5"}
