"""The processes of one job: how they start, meet, say what went wrong, and end together.

The first rank starts the others itself, or torchrun starts all. The ranks that hold one model together meet at a small
key-value store, which the first rank (or torchrun) keeps on a free port; without torchrun all ports are of 127.0.0.1
alone. Besides torch.distributed, which needs it to begin, it holds

    job          what the others are to do, JSON; empty: nothing
    beat/RANK    a number that grows while the process lives, and how far it has come
    failed/RANK  why a rank ended

Torchrun's store holds this for each replica (`Meeting.join`), and another `job` for their first ranks.

Knows processes and signals of life. Does not know what they compute.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minisgl.errors import MinisglError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOCALHOST = "127.0.0.1"
CONNECT_S = 60.0
EXIT_S = 10.0  # for a process that was asked to end
FAILED = 2  # exit code
OF_REPLICA = "MINISGL_REPLICA"  # in the environment where another process hands out the work, and says what failed
TOKEN_BYTES = 32


class Place(NamedTuple):
    """A process among those of a job, and which of its machine's it is."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def given(cls) -> "Place":
        """What RANK, WORLD_SIZE and LOCAL_RANK say."""
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def started() -> Iterator[None]:
    """While a process of ours works, what it made to start is not searched for garbage: a full collection, for which
    all steps and answers wait, takes 0.03 s in place of 0.15."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_on_this_machine(num_processes: int) -> bool:
    """Whether torchrun has each group of so many consecutive processes on one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) % num_processes == 0


class Meeting:
    """The store of a job, as one process reaches it."""

    def __init__(
        self, place: Place, host: str, port: int, listener: socket.socket | None = None, prefix: str = "minisgl"
    ) -> None:
        """`listener` makes this process the one that keeps the store. MinisglError when it cannot be reached."""
        self.place, self.host, self.port, self.prefix = place, host, port, prefix
        self.store = self._connect(listener)

    @classmethod
    def open(cls, size: int) -> "Meeting":
        """Of a first rank that starts the others itself."""
        _stay_on_this_machine()
        listener = socket.create_server((LOCALHOST, 0))
        return cls(Place(0, size, 0), LOCALHOST, listener.getsockname()[1], listener, "minisgl/0")

    @classmethod
    def join(cls, size: int | None = None) -> "Meeting":
        """Where the environment says that it is: of all processes, or of those `size` that hold one model."""
        place, prefix = Place.given(), "minisgl"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = None
        if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            with suppress(OSError):  # this process, or the one that started it, keeps the store already
                listener = socket.create_server((host, port))
        if size:
            prefix = f"minisgl/{place.rank // size}"
            place = Place(place.rank % size, size, place.local_rank)
        if is_on_this_machine(place.size):
            _stay_on_this_machine()
        return cls(place, host, port, listener, prefix)

    def again(self) -> "Store":
        """A connection of its own, for another thread."""
        return self._connect(None)

    def announce(self, job: dict[str, Any] | None, key: str = "job") -> None:
        """Say what the others are to do; None: nothing. The first word counts."""
        if not self.store.check([key]):
            self.store.set(key, json.dumps(job) if job else "")

    def dismiss(self, size: int) -> None:
        """Let all processes end that still wait for what they are to do, in groups of `size`."""
        for key in ("job", *(f"{replica}/job" for replica in range(self.place.size // size))):
            self.announce(None, key)

    def await_job(self) -> dict[str, Any] | None:
        """What the first rank announces, however long that takes."""
        try:
            self.store.wait(["job"], timedelta(days=7))
            text = self.store.get("job")
        except RuntimeError as error:
            raise MinisglError("rank 0 is gone") from error
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
        return PrefixStore(self.prefix, store)


class Followers:
    """The other ranks' processes, where the first one started them. They end when it does, also when it is killed:
    each waits for the end of its standard input."""

    def __init__(self, meeting: Meeting, num_threads: int) -> None:
        """num_threads: for the torch of each, on a CPU."""
        shared = {"WORLD_SIZE": meeting.place.size, "MASTER_ADDR": meeting.host, "MASTER_PORT": meeting.port}
        shared["OMP_NUM_THREADS"] = num_threads
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, meeting.place.size):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            self.processes[rank] = start_module("minisgl.worker", environment=own)

    def ended(self, rank: int) -> str | None:
        """How a rank's process ended, in words; None while it runs."""
        return how_it_ended(self.processes[rank]) if rank in self.processes else None

    def wait(self) -> None:
        """They were asked to end: wait for them, and kill those that do not."""
        for process in self.processes.values():
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        end(self.processes.values())


def start_module(
    module: str, *arguments: str, environment: Mapping[str, object], fds: Iterable[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a module of this package in a process of its own."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # else a rank whose store went away prints 20 lines of C++
            **os.environ,
            **{name: str(value) for name, value in environment.items()},
            "PYTHONPATH": path,
        },
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno() if _is_open(sys.stderr) else subprocess.DEVNULL,  # results go to stdout
        start_new_session=True,  # Ctrl-C is the first rank's to handle
        pass_fds=tuple(fds),
    )


def how_it_ended(process: "subprocess.Popen[bytes]") -> str | None:
    """In words; None while it runs."""
    code = process.poll()
    if code is None:
        return None
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def end(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """Kill those that still run."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        if process.stdin:
            process.stdin.close()


def accept(meeting: Meeting, count: int, job: dict[str, Any]) -> "list[Connection[bytes, bytes]]":
    """Announce a job, and wait for the connections of as many processes that know from it how to `connect`."""
    token = os.urandom(TOKEN_BYTES)
    host = LOCALHOST if is_on_this_machine(meeting.place.size) else ""
    connections: list[Connection[bytes, bytes]] = []
    with Listener((host, 0), "AF_INET", backlog=count, authkey=token) as listener:
        meeting.announce({**job, "port": listener.address[1], "token": token.hex()})
        while len(connections) < count:
            with suppress(AuthenticationError, EOFError, OSError):  # somebody else's, or one that went away
                connections.append(_at_once(listener.accept()))
    return connections


def connect(meeting: Meeting, job: dict[str, Any]) -> "Connection[bytes, bytes]":
    """See `accept`."""
    host = LOCALHOST if is_on_this_machine(meeting.place.size) else meeting.host
    try:
        return _at_once(Client((host, job["port"]), authkey=bytes.fromhex(job["token"])))
    except (OSError, EOFError, AuthenticationError) as error:
        reason = f"{host}:{job['port']} ({error}): let ports above 1023 through between the machines of the job"
        raise MinisglError(f"rank {meeting.place.rank} cannot reach {reason}") from error


def _at_once(connection: "Connection[bytes, bytes]") -> "Connection[bytes, bytes]":
    """A connection that does not hold small messages back."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


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
