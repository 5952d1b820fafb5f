"""A really running server on the demo model, for every test that asks over HTTP."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import pytest

for name in ("fastapi", "uvicorn", "uvloop", "zmq", "msgspec", "prometheus_client", "python_multipart"):
    pytest.importorskip(name, reason="needs the extra serve: pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx", reason="needs the extra dev: pip install -e '.[dev]'")

from minisgl.demo import MODEL_PATH  # noqa: E402

ROOT = Path(__file__).parents[2]
START_S, END_S = 60, 20


class RunningServer:
    """`minisgl serve` in a process of its own; its stderr is read along."""

    def __init__(self, *flags: str, launcher: Sequence[str] = (), **variables: str) -> None:
        """`launcher`: of Python programs, with its flags; `process` is that one then."""
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONUNBUFFERED": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "minisgl"), "serve", "--port", "0", "--num-pages", "128", *flags],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        alarm = threading.Timer(START_S, self.process.kill)
        alarm.start()
        assert self.process.stdout is not None
        self.greeting = [self.process.stdout.readline() for _ in range(3)]
        alarm.cancel()
        found = re.search(r"http://\S+", self.greeting[0])
        assert found, "".join(self.log)
        self.url = found[0]

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    @property
    def engine_pid(self) -> int:
        """Of its engine process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = [int(pid) for pid in children if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(named) == 1
        return named[0]

    @cached_property
    def _watcher(self) -> "httpx.Client":
        return self.client()  # making one takes 50 ms, which no measured time should have in it

    def client(self, **options: object) -> "httpx.Client":
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def stats(self) -> dict[str, float]:
        stats: dict[str, float] = self._watcher.get("/stats").json()
        return stats

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """One server for all tests that do not harm it."""
    if not any(MODEL_PATH.glob("*.safetensors")):
        pytest.skip("needs the demo model's weights")
    running = RunningServer()
    yield running
    assert running.stop() == 0, "".join(running.log)


@pytest.fixture
def client(server: RunningServer) -> Iterator["httpx.Client"]:
    with server.client() as client:
        yield client
