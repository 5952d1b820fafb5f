"""`minisgl run` on several ranks and replicas of the demo model: the same file as on one, and an end for all when one
fails."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import read_rows

ROOT = Path(__file__).parents[2]
RUN = ["run", "prompts.jsonl", "--device", "cpu", "--progress", "none", "--max-tokens"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prompts(tmp_path)
    return tmp_path


def write_prompts(folder: Path, times: int = 1) -> None:
    rows = [{"prompt": f"{index} + 3 = " * times, "temperature": index % 2} for index in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, command: list[str], **variables: str) -> "subprocess.Popen[str]":
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env | variables, stderr=subprocess.PIPE, text=True)


def followers_of(pid: int, module: str = "worker") -> list[int]:
    """The other ranks, or replicas, that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            of_parent = int(path.read_text().rpartition(")")[2].split()[1]) == pid
            if of_parent and b"minisgl.%s" % module.encode() in path.with_name("cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def ends(pid: int, within_s: float = 10) -> bool:
    """A process closes its files, which is what its parent sees, a moment before it is gone."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_same_output_at_any_number_of_ranks(folder: Path) -> None:
    minisgl = [sys.executable, "-m", "minisgl"]
    limit = ["8", "--limit", "12", "--return-token-ids"]
    for name, command in {
        "one": [*minisgl, *RUN, *limit],
        "two": [*minisgl, *RUN, *limit, "--tp", "2"],
        "torchrun": [*TORCHRUN, str(ROOT / "minisgl"), *RUN, *limit],
        "nothing left": [*TORCHRUN, "-m", "minisgl", *RUN, *limit],  # no engine is needed: all ranks end
    }.items():
        process = start(folder, [*command, "-o", "torchrun.jsonl" if name == "nothing left" else f"{name}.jsonl"])
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    expected = read_rows(folder / "one.jsonl")
    assert len(expected) == 12
    for name in ("two", "torchrun"):
        assert read_rows(folder / f"{name}.jsonl") == expected
    nodes = [start(folder, [*command, *RUN, *limit, "--tp", "2", "-o", "nodes.jsonl"]) for command in two_nodes()]
    for process in nodes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    found = read_rows(folder / "nodes.jsonl")
    assert [row["token_ids"] for row in found] == [row["token_ids"] for row in expected]


def two_nodes() -> list[list[str]]:
    """torchrun on two machines of two processes each, both this one: two replicas of two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [*TORCHRUN[:3], "--nnodes", "2", *TORCHRUN[4:], "--master-addr", "127.0.0.1", "--master-port", port]
    return [[*command, "--node-rank", rank, "-m", "minisgl"] for rank in "01"]


def kill(rank: int) -> None:
    os.kill(rank, signal.SIGKILL)


def stop(rank: int) -> None:
    os.kill(rank, signal.SIGSTOP)


def starve(rank: int) -> None:
    resource.prlimit(rank, resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))


def starving_works() -> bool:
    """Not every sandbox enforces the limit."""
    command = [sys.executable, "-c", "import mmap; input(); mmap.mmap(-1, 1 << 24)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        starve(process.pid)
        process.communicate(b"\n")
    return process.returncode != 0


@pytest.mark.parametrize(
    "fault, line",
    [
        (kill, "rank 1 was killed by signal 9"),
        (starve, "rank 1 failed: out of memory"),
        (stop, "rank 1 does not answer: a step takes longer than --watchdog-s 4"),
        (None, "rank 0 is gone"),
    ],
    ids=["killed", "out of memory", "hangs", "the first is killed"],
)
def test_a_rank_that_fails_ends_the_job_which_can_go_on(folder: Path, fault, line: str) -> None:  # type: ignore[no-untyped-def]
    output = folder / "out.jsonl"
    options = ["60", "--ignore-eos", "--max-running", "4", "-o", str(output), "--tp", "2", "--watchdog-s", "4"]
    variables = {}
    if fault is starve:
        if not starving_works():
            pytest.skip("a process that may have no more memory gets some here")
        # Steps that take megabytes, which come from the system each time: else, one that starves may have enough.
        write_prompts(folder, times=60)
        variables = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_ARENA_MAX": "1"}
    process = start(folder, [sys.executable, "-m", "minisgl", *RUN, *options], **variables)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.05)
    [follower] = followers_of(process.pid)
    began_s = time.monotonic()
    if fault:
        fault(follower)
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began_s < 30
    assert process.returncode == (2 if fault else -signal.SIGKILL)
    assert sum(line in said for said in err.splitlines()) == 1 and "Traceback" not in err, err
    assert ends(follower)
    assert 0 < len(read_rows(output)) < 20
    done = start(folder, [sys.executable, "-m", "minisgl", *RUN, *options[:6]])
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert [row["index"] for row in read_rows(output)] == list(range(20))


def test_ranks_that_do_not_come_together_end(folder: Path) -> None:
    program = folder / "impatient.py"
    program.write_text("import minisgl.worker\nminisgl.worker.START_S = 4\nfrom minisgl.cli.main import main\nmain()\n")
    process = start(folder, [sys.executable, str(program), *RUN, "16", "-o", str(folder / "out.jsonl"), "--tp", "2"])
    while process.poll() is None and not (followers := followers_of(process.pid)):
        time.sleep(0.01)
    stop(*followers)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and all(map(ends, followers))
    assert err.splitlines()[-1] == "Error: the processes did not come together within 4 s"


def test_a_replica_that_hangs_ends_the_job_which_can_go_on(folder: Path) -> None:
    output = folder / "out.jsonl"
    options = ["60", "--ignore-eos", "--max-running", "4", "-o", str(output)]
    command = [sys.executable, "-m", "minisgl", *RUN, *options]
    process = start(folder, [*command, "--dp", "2", "--watchdog-s", "3"])
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.05)
    replicas = sorted(followers_of(process.pid, "replica_process"))
    stop(replicas[1])
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and "Traceback" not in err
    assert "Error: stopped: replica 1 does not answer: a step takes longer than --watchdog-s 3; " in err
    assert all(map(ends, replicas))
    assert 0 < len(read_rows(output)) < 20
    done = start(folder, command)
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert [row["index"] for row in read_rows(output)] == list(range(20))
