"""Processes that meet as torchrun's do: `run_ranks(script, size)` for tests, `python tests/ranks.py` in each of them.

A script is a function of this module's `SCRIPTS`; what it returns comes back to the test.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run_ranks(script, size, folder, *arguments, timeout_s=240, environment=()):
    """What `tests.rank_scripts.<script>(*arguments)` returned in each of `size` processes. No process is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    try:
        for rank in range(size):
            own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
            inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "tests.ranks", script, str(folder / f"{rank}.pt"), *map(str, arguments)]
            with (folder / f"{rank}.log").open("wb") as log:
                environ = inherited | own | dict(environment)
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log))
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break  # one failed: the others wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(size)]
    failed = [f"rank {rank} ended with {process.returncode}:\n{logs[rank][-3000:]}"
              for rank, process in enumerate(processes) if process.returncode]  # fmt: skip
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


if __name__ == "__main__":
    from tests import rank_scripts

    torch.set_num_threads(1)
    script, out, *arguments = sys.argv[1:]
    torch.save(getattr(rank_scripts, script)(*arguments), out)
