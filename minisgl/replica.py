"""A replica, as far as the process knows it that hands out the work, and how the processes of replicas start.

`Replicas` decides which request it gets; `ReplicaProcess` is what answers, at the other end of the connection.

Knows connections, messages as bytes, and which prompts were sent. Does not know the other replicas.
"""

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections import deque
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from minisgl.config import EngineConfig
from minisgl.core import CoreStats
from minisgl.plan import unpack
from minisgl.processes import EXIT_S, OF_REPLICA, Meeting, accept, end, how_it_ended, is_of_torchrun, start_module
from minisgl.radix_cache import RadixCache
from minisgl.replica_messages import BEAT
from minisgl.request import Request
from minisgl.upload import Ints

BEAT_S = 5.0


class Replica:
    """A replica, as far as it is known here. load: what it has to do, in prompt tokens."""

    def __init__(self, connection: "Connection[bytes, bytes]", process: "subprocess.Popen[bytes] | None") -> None:
        self.connection = connection
        self.process = process  # None: on another rank of torchrun
        self.requests: dict[int, Request] = {}  # by id, until they end
        self.load = 0
        self.sent = RadixCache(1)  # prompts; what it holds are no pages
        self.stats = CoreStats()
        self.inbox: deque[tuple[dict[str, Any], Ints]] = deque()
        self.heard_s = time.monotonic()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._post, daemon=True).start()

    def send(self, message: bytes) -> None:
        """Never waits, whatever the replica does."""
        self._outbox.put(message)

    def _post(self) -> None:
        beat_s = BEAT_S if self.process is None else None  # the other end of a pipe knows when this process ends
        with contextlib.suppress(OSError):  # it is gone: whoever listens finds out
            while True:
                message: bytes | None = BEAT
                with contextlib.suppress(queue.Empty):
                    message = self._outbox.get(timeout=beat_s)
                if message is None:
                    return
                self.connection.send_bytes(message)

    def read(self) -> None:
        """Take in one message, which is there. EOFError and OSError when the replica is gone."""
        self.inbox.append(unpack(self.connection.recv_bytes()))
        self.heard_s = time.monotonic()

    def start(self, config: EngineConfig) -> None:
        """It is loaded, with this config of its own."""
        assert config.num_pages is not None
        capacity = config.num_pages * config.page_size
        self.sent, self.stats = RadixCache(config.page_size), CoreStats(capacity=capacity, free=capacity)

    def prompt_tokens_to_do(self, request: Request) -> int:
        """Of a request, as far as is known."""
        _, known = self.sent.match(request.tokens[: request.num_prompt])
        return request.num_prompt - len(known) * self.sent.page_size

    def note_sent(self, request: Request) -> None:
        """Remember a prompt, and no more of them than the replica's pages hold."""
        page_size = self.sent.page_size
        prompt = request.tokens[: request.num_prompt // page_size * page_size]
        node, known = self.sent.match(prompt)
        self.sent.insert(node, prompt, [0] * (len(prompt) // page_size - len(known)))
        self.sent.evict(self.sent.num_pages - self.stats.capacity // page_size)

    def how_it_ended(self) -> str:
        """Its connection has."""
        if self.process is None:
            return "is gone; torchrun says below which rank ended first, and how"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        return how_it_ended(self.process) or "is gone"

    def wait(self) -> None:
        """It was told to end."""
        with contextlib.suppress(subprocess.TimeoutExpired, EOFError, OSError):
            if self.process:
                self.process.wait(EXIT_S)
            while self.connection.poll(EXIT_S):
                self.connection.recv_bytes()  # what it said before

    def kill(self) -> None:
        """On another machine, it ends with its connection."""
        self._outbox.put(None)
        if self.process:
            end([self.process])
        self.connection.close()


def start_replicas(config: EngineConfig) -> list[Replica]:
    """The processes, those of torchrun in the order of their ranks."""
    if not is_of_torchrun():
        return [_start_here({OF_REPLICA: number, **_gpus(config, number)}) for number in range(config.dp)]
    first = _start_here({OF_REPLICA: 0})  # in the place of this process, which has a rank and hands out the work
    meeting = Meeting.join()
    by_rank = {}
    for connection in accept(meeting, config.dp - 1, {}):
        header, _ = unpack(connection.recv_bytes())
        by_rank[header["rank"]] = Replica(connection, None)
    return [first, *(by_rank[rank] for rank in sorted(by_rank))]


def _start_here(environment: dict[str, object]) -> Replica:
    own, its = Pipe()
    process = start_module("minisgl.replica_process", str(its.fileno()), environment=environment, fds=[its.fileno()])
    its.close()
    return Replica(own, process)


def _gpus(config: EngineConfig, number: int) -> dict[str, object]:
    """What shows a replica its GPUs alone."""
    if config.device == "cpu":
        return {}
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": ",".join(shown.split(",")[number * config.tp :][: config.tp])}
