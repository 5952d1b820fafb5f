"""One of several engines: requests come by a connection, EngineCore answers them step by step.

    python -m minisgl.replica_process FD      of a connection that is inherited
    join()                                    in a process of torchrun

It ends with the process that hands out the work: its connection ends then, whatever a step is doing.

Knows messages and EngineCore. Does not know the other replicas.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from minisgl.config import EngineConfig
from minisgl.engine_core import EngineCore
from minisgl.models.config import ModelConfig
from minisgl.models.generation import generation_defaults
from minisgl.plan import pack, unpack
from minisgl.processes import FAILED, OF_REPLICA, Meeting, connect, is_of_torchrun, started
from minisgl.replica_messages import pack_ids, pack_progress, unpack_requests
from minisgl.request import Request
from minisgl.resolve import resolve_device
from minisgl.structured import GrammarCopies
from minisgl.tokenizer import Tokenizer
from minisgl.watch import SILENT_S, describe, print_failure

IDLE_S = 0.5  # between looks at the ranks, while no request is there

Told = tuple[dict[str, Any], dict[int, Request]]  # a message's header, and the requests that it brings


class ReplicaProcess:
    """Serves one EngineCore over `connection`, which brings a sign of life each `silent_s` or ends with the process at
    its other end."""

    def __init__(self, connection: "Connection[bytes, bytes]", silent_s: float | None = None) -> None:
        self._connection = connection
        self._silent_s = silent_s
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._job: dict[str, Any] = {}
        self._requests: dict[int, Request] = {}
        self._num_sent: dict[int, int] = {}  # output tokens
        self._closing = False
        threading.Thread(target=self._failing, args=[self._read], daemon=True).start()

    def run(self) -> None:
        """Load the model and answer, until told to close."""
        self._failing(self._answer)

    def _answer(self) -> None:
        core = self._load(self._inbox.get()[0]["begin"])
        core.engine.on_hang(lambda failure: self._send(pack({"failed": failure})))
        core.while_waiting = lambda: self._take_in(core)
        self._send(pack({"ready": vars(core.config)}))
        with started():
            while self._receive(core):
                self._step(core)
        core.close()

    def _step(self, core: EngineCore) -> None:
        """A step, if there is something to do, and what came of it; in any case how the engine stands."""
        progressed = core.step() if core.num_unfinished else []
        found = [
            (request.index, request, self._num_sent[request.index])
            for request in progressed
            if request.index in self._requests  # not aborted since it got its tokens
        ]
        self._send(pack_progress(found, core.stats()))
        for id, request, _ in found:
            self._num_sent[id] = request.num_output
            if request.finish_reason:
                self._forget(id)

    def _load(self, job: dict[str, Any]) -> EngineCore:
        folder, config = Path(job["folder"]), EngineConfig(**job["config"])
        device = resolve_device(config.device)
        if device.type == "cuda" and is_of_torchrun() and config.tp == 1:
            config = replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
        if device.type == "cpu" and not is_of_torchrun():  # which has set OMP_NUM_THREADS
            torch.set_num_threads(max(1, torch.get_num_threads() // job["num_replicas"]))
        model_config = ModelConfig.from_folder(folder)
        return EngineCore(config, model_config, folder, generation_defaults(folder, model_config, None))

    def _receive(self, core: EngineCore) -> bool:
        """Take in messages; wait for one when nothing else is to do. False: end."""
        first: Told | None = None
        while not (first or core.num_unfinished or self._closing):
            try:
                first = self._inbox.get(timeout=IDLE_S)
            except queue.Empty:
                core.check()
        self._take_in(core, first)
        return not self._closing

    def _take_in(self, core: EngineCore, first: Told | None = None) -> None:
        """Do what all messages say that are there, `first` before them."""
        submitted: list[Request] = []
        while not self._closing and (first or not self._inbox.empty()):
            header, requests = first or self._inbox.get()
            first = None
            if "close" in header:
                self._closing = True
            self._requests |= requests
            self._num_sent |= dict.fromkeys(requests, 0)
            submitted += requests.values()
            if "abort" in header or "drop" in header:
                core.submit(submitted)
                submitted = []
            for id in header.get("abort", ()):
                if request := self._requests.get(id):  # it may have ended meanwhile
                    self._forget(id)
                    core.abort(request)
            if "drop" in header:
                dropped = [request.index for request in core.drop_waiting()]
                for id in dropped:
                    self._forget(id)
                self._send(pack_ids("dropped", dropped))
            if "forget" in header:
                core.reset_prefix_cache()
        core.submit(submitted)

    def _forget(self, id: int) -> None:
        del self._requests[id], self._num_sent[id]

    def _read(self) -> None:
        """Take in messages and make their requests, beside the steps."""
        while True:
            try:
                if not self._connection.poll(self._silent_s):
                    self._end(f"rank 0 has shown no sign of life for {self._silent_s:g} s: it is stopped, or gone")
                header, arrays = unpack(self._connection.recv_bytes())
            except (EOFError, OSError):
                self._end()
            if not header:
                continue
            requests: dict[int, Request] = {}
            if "begin" in header:
                self._job = header["begin"]
            elif "submit" in header:
                eos_ids = frozenset(self._job["eos_ids"])
                requests = unpack_requests(header, arrays, eos_ids, lambda *text: self._grammars.get(*text))
            elif "abort" in header:
                header["abort"] = arrays.tolist()
            self._inbox.put((header, requests))

    @cached_property
    def _grammars(self) -> GrammarCopies:
        folder = Path(self._job["folder"])
        return GrammarCopies(Tokenizer(folder), ModelConfig.from_folder(folder).vocab_size, self._job["eos_ids"])

    def _failing(self, work: Callable[[], None]) -> None:
        """What fails in any thread ends the replica, which says why."""
        try:
            work()
        except Exception as error:
            self._send(pack({"failed": describe(error)}))
            os._exit(FAILED)  # at once, whatever other threads and devices wait for

    def _send(self, message: bytes) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(message)
        except OSError:
            self._end()

    def _end(self, reason: str = "") -> NoReturn:
        """Nobody hands out work any more."""
        if reason and os.environ[OF_REPLICA] == "1":  # one line, and not one of each
            print_failure(reason)
        os._exit(FAILED)


def join() -> None:
    """Be the replica whose first rank this process of torchrun is, until the first process ends the job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as with Ctrl-C, the first process decides what follows
    meeting = Meeting.join()
    job = meeting.await_job()
    if job is None:
        return
    connection = connect(meeting, job)
    connection.send_bytes(pack({"rank": meeting.place.rank}))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ReplicaProcess(connection, SILENT_S).run()


if __name__ == "__main__":
    if is_of_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ReplicaProcess(Connection(int(sys.argv[1]))).run()
