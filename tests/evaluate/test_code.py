"""What a generated program cannot do."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minisgl.evaluate.code import in_parallel, runs


def test_a_program_that_ends_well_and_one_that_does_not() -> None:
    assert runs("import math\nassert math.sqrt(4) == 2")
    for program in ("assert False", "raise SystemExit", "import os; os._exit(0)", "def f(:", "print('x'); exit(0)"):
        assert not runs(program), program


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "open('big', 'wb').write(b'x' * (2 << 20))",
        "print('x' * (2 << 20))",
        "files = [open('f', 'w') for _ in range(100)]",
        "while True: pass",
        "import time; time.sleep(60)",
    ],
)
def test_limits(program: str) -> None:
    started_s = time.perf_counter()
    assert not runs(program, timeout_s=2, memory_mib=256)
    assert time.perf_counter() - started_s < 10


def test_a_program_sees_neither_our_environment_nor_our_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    assert runs("import os; assert 'SECRET_OF_A_TEST' not in os.environ")
    assert runs(
        "import os; assert os.listdir() == ['program.py', 'stdout'] or os.listdir() == ['stdout', 'program.py']"
    )
    assert runs("open('left', 'w').write('x')") and list(tmp_path.iterdir()) == []


def test_a_program_has_no_network() -> None:
    unshare = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if subprocess.run([sys.executable, "-c", unshare]).returncode:
        pytest.skip("this system lets nobody make a network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not runs(connect)


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 1; touch {mark}'])"
    assert runs(program)
    time.sleep(1.5)
    assert not mark.exists()


def test_in_parallel_keeps_the_order() -> None:
    assert list(in_parallel(lambda number: number * 2, range(600))) == [number * 2 for number in range(600)]
