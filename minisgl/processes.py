"""The processes of one job: how they start, meet, say what went wrong, and end together.

The first rank starts the others itself, or torchrun starts all. They meet at a small key-value store, which the first
rank (or torchrun) keeps on a free port; without torchrun all ports are of 127.0.0.1 alone. Besides torch.distributed,
which needs it to begin, it holds

    job          what the others are to do, JSON; empty: nothing
    beat/RANK    a number that grows while the process lives, and how far it has come
    failed/RANK  why a rank ended

Knows processes and signals of life. Does not know what they compute.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minisgl.errors import MinisglError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOCALHOST = "127.0.0.1"
CONNECT_S = 60.0
EXIT_S = 10.0  # for a process that was asked to end
FAILED = 2  # exit code


class Place(NamedTuple):
    """A process among those of a job, and which of its machine's it is."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def given(cls) -> "Place":
        """What RANK, WORLD_SIZE and LOCAL_RANK say."""
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def is_of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Meeting:
    """The store of a job, as one process reaches it."""

    def __init__(self, place: Place, host: str, port: int, listener: socket.socket | None = None) -> None:
        """`listener` makes this process the one that keeps the store. MinisglError when it cannot be reached."""
        self.place, self.host, self.port = place, host, port
        self.store = self._connect(listener)

    @classmethod
    def open(cls, size: int) -> "Meeting":
        """Of a first rank that starts the others itself."""
        _stay_on_this_machine()
        listener = socket.create_server((LOCALHOST, 0))
        return cls(Place(0, size, 0), LOCALHOST, listener.getsockname()[1], listener)

    @classmethod
    def join(cls) -> "Meeting":
        """Where the environment says that it is."""
        place = Place.given()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("LOCAL_WORLD_SIZE", str(place.size)) == str(place.size):
            _stay_on_this_machine()
        keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return cls(place, host, port, socket.create_server((host, port)) if keeps else None)

    def again(self) -> "Store":
        """A connection of its own, for another thread."""
        return self._connect(None)

    def announce(self, job: dict[str, Any] | None) -> None:
        """Say what the others are to do; None: nothing. The first word counts."""
        if not self.store.check(["job"]):
            self.store.set("job", json.dumps(job) if job else "")

    def await_job(self) -> dict[str, Any] | None:
        """What the first rank announces, however long that takes."""
        self.store.wait(["job"], timedelta(days=7))
        text = self.store.get("job")
        job: dict[str, Any] | None = json.loads(text) if text else None
        return job

    def _connect(self, listener: socket.socket | None) -> "Store":
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        try:
            store = TCPStore(
                self.host,
                self.port,
                is_master=listener is not None,
                timeout=timedelta(seconds=CONNECT_S),
                wait_for_workers=False,
                master_listen_fd=listener.detach() if listener else None,
            )
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MinisglError(f"rank {self.place.rank} cannot reach {self.host}:{self.port} ({reason})") from error
        return PrefixStore("minisgl", store)


class Followers:
    """The other ranks' processes, where the first one started them. They end when it does, also when it is killed:
    each waits for the end of its standard input."""

    def __init__(self, meeting: Meeting) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        shared = {"WORLD_SIZE": meeting.place.size, "MASTER_ADDR": meeting.host, "MASTER_PORT": meeting.port}
        cores = {"OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // meeting.place.size)}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, meeting.place.size):
            own = {**cores, **os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": path}
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "minisgl.worker"],
                env={name: str(value) for name, value in own.items()},
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno() if _is_open(sys.stderr) else subprocess.DEVNULL,  # results go to stdout
                start_new_session=True,  # Ctrl-C is the first rank's to handle
            )

    def ended(self, rank: int) -> str | None:
        """How a rank's process ended, in words; None while it runs."""
        code = self.processes[rank].poll() if rank in self.processes else None
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def wait(self) -> None:
        """They were asked to end: wait for them, and kill those that do not."""
        for process in self.processes.values():
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()
            if process.stdin:
                process.stdin.close()


def when_the_first_rank_ends(action: Any) -> None:
    """Call `action` in a thread of a follower, once the process that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def _stay_on_this_machine() -> None:
    """Let gloo and NCCL listen where no other machine can reach them."""
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def _is_open(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (OSError, ValueError, AttributeError):  # closed, captured, or none
        return False
