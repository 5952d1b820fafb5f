"""Runs generated programs, only where the user allows it: each in a subprocess of its own with limits.

Knows processes. Does not know tasks. This keeps mistakes from doing harm; against hostile programs use a container or a
virtual machine.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

TIMEOUT_S = 10
MEMORY_MIB = 2048
CHUNK_ITEMS = 256

_CONFINED = Path(__file__).with_name("confined.py")

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_parallel(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`map` in threads, as many as there are cores: for functions that wait for subprocesses."""
    items = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(items, CHUNK_ITEMS)):
            yield from pool.map(function, chunk)


def runs(program: str, timeout_s: int = TIMEOUT_S, memory_mib: int = MEMORY_MIB) -> bool:
    """Whether a Python program reaches its last line. One that ends itself before, by exit() say, does not."""
    mark = secrets.token_hex(16)
    with TemporaryDirectory(prefix="minisgl-code-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{program}\n\nprint({mark!r})\n", encoding="utf-8", errors="replace")
        with (
            (Path(folder) / "stdout").open("w+b") as stdout,  # a file, since its size is limited and a pipe's is not
            subprocess.Popen(
                [sys.executable, "-I", str(_CONFINED), str(path), str(timeout_s), str(memory_mib)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process,
        ):
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
            finally:
                _kill_group(process.pid)
        lines = (Path(folder) / "stdout").read_bytes().splitlines()
        return process.returncode == 0 and lines[-1:] == [mark.encode()]


def _kill_group(pid: int) -> None:
    """End the program and what it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have ended
