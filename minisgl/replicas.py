"""Several engines that share the work, each in a process of its own, on one GPU or on `tp` of them.

    submit -> one queue, here -> the replica with the least to do for a request -> its tokens, as they come

A replica has few requests more than it runs; all others wait here, so that nobody is left with work while others are
idle. For each replica there is a tree of the prompts that it was sent last: what it has to do for a request is less by
the prefix that it should still have.

Knows requests and what is known of the replicas. Does not know tensors, or how a replica answers.
"""

import atexit
import itertools
import time
from collections import deque
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from minisgl.config import EngineConfig
from minisgl.core import Core, CoreStats
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.models.generation import GenerationDefaults
from minisgl.plan import pack
from minisgl.planner import plan_order
from minisgl.replica import Replica, start_replicas
from minisgl.replica_messages import CLOSE, DROP, FORGET, pack_ids, pack_requests, read_progress
from minisgl.request import Request
from minisgl.resolve import resolve
from minisgl.upload import Ints

# What an output token takes, in prompt tokens: on an H200 3.4 with Qwen3-8B and 16 with Qwen3-0.6B (bench/results).
OUTPUT_COST = 4
BURST = 32  # requests that are sent together: a replica begins while others are handed out
LOOK_S = 0.002  # between calls of `while_waiting`
POLL_S = 0.5  # between looks at the clock, while no replica says anything
AWAY_S = 1.0  # the caller did something else: that time is nobody's fault
EXPLAIN_S = 8.0  # for the ranks of a replica to find out which of them hangs

CPU = torch.device("cpu")


class Handed(NamedTuple):
    """Where a request is: its replica, its id there, and the prompt tokens that it should take."""

    replica: Replica
    id: int
    prompt_tokens: int


class Replicas(Core):
    """`dp` engines, as one. Raises MinisglError when one cannot start, and with its number and the cause when one fails
    later: then all of them end, and this can only be closed."""

    def __init__(
        self, asked: EngineConfig, model_config: ModelConfig, folder: Path, defaults: GenerationDefaults
    ) -> None:
        config = resolve(asked, model_config)
        self._queue: deque[Request] = deque()
        self._handed: dict[Request, Handed] = {}
        self._ids = itertools.count()
        self._failure: str | None = None
        self._closed = False
        self._left_s = time.monotonic()  # the last step
        self._limit_s = float("inf")  # until all are loaded
        self._replicas = start_replicas(config)
        atexit.register(self.close)
        try:
            job = {
                "config": asdict(replace(asked, dp=1)),
                "folder": str(folder.resolve()),
                "eos_ids": sorted(defaults.eos_ids),
                "num_replicas": config.dp,
            }
            for each in self._replicas:
                each.send(pack({"begin": job}))
            configs = [EngineConfig(**self._answer_of(each, "ready")[0]["ready"]) for each in self._replicas]
        except BaseException:
            self._failure = self._failure or "it did not start"
            self.close()
            raise
        # Ranks of a replica watch each other, and say more: they come first.
        self._limit_s = config.watchdog_s + (EXPLAIN_S if config.tp > 1 else 0)
        for each, own in zip(self._replicas, configs, strict=True):
            each.start(own)
        least = min(configs, key=lambda config: config.num_pages or 0)
        super().__init__(replace(least, dp=config.dp, device=config.device), model_config, defaults)

    @property
    def num_unfinished(self) -> int:
        return len(self._queue) + len(self._handed)

    def stats(self) -> CoreStats:
        total = CoreStats(*map(sum, zip(*(each.stats for each in self._replicas), strict=True)))
        return total._replace(waiting=total.waiting + len(self._queue))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for request in [*self._handed, *self._queue]:
            self.abort(request)
        if not self._failure:
            for each in self._replicas:
                each.send(CLOSE)
            for each in self._replicas:
                each.wait()
        self._kill()

    def reset_prefix_cache(self) -> None:
        for each in self._replicas:
            each.sent.clear()
            each.send(FORGET)

    # -- requests --

    def submit(self, requests: list[Request]) -> None:
        self._check_failure()
        self._queue.extend(plan_order(requests, self.config.page_size, CPU))
        self._hand_out()

    def abort(self, request: Request) -> None:
        if request.retired:
            return
        request.retired = True
        request.finish_reason = request.finish_reason or "abort"
        if request in self._handed:
            place = self._take_out(request)
            place.replica.send(pack_ids("abort", [place.id]))
        else:
            self._queue.remove(request)

    def drop_waiting(self) -> list[Request]:
        self._check_failure()
        dropped = list(self._queue)
        self._queue.clear()
        for each in self._replicas:
            each.send(DROP)
        for each in self._replicas:
            _, ids = self._answer_of(each, "dropped")
            waited = [each.requests[id] for id in ids.tolist() if id in each.requests]
            for request in waited:
                self._take_out(request)
            dropped += waited
        for request in dropped:
            request.retired, request.finish_reason = True, "abort"
        return dropped

    def step(self) -> list[Request]:
        """Wait for a step of any replica; of each, one is handled at a time."""
        self._look()
        self._hand_out()
        while self._handed and not any(each.inbox for each in self._replicas):
            self._listen(LOOK_S if self.while_waiting else POLL_S)
            if self.while_waiting:
                self.while_waiting()
        progressed = self._take_in()
        self._hand_out()
        self._left_s = time.monotonic()
        return progressed

    def check(self) -> None:
        self._look()
        if not self._handed:
            self._take_in()  # how they stand

    # -- work --

    def _hand_out(self) -> None:
        """Give requests of the queue to the replicas that have room."""
        most = self.config.max_running * 3 // 2
        bursts: dict[Replica, dict[int, Request]] = {}
        while self._queue and (free := [each for each in self._replicas if len(each.requests) < most]):
            request = self._queue.popleft()
            costs = {each: each.prompt_tokens_to_do(request) for each in free}
            chosen = min(free, key=lambda each: (each.load + costs[each], each.sent.num_pages))
            if not chosen.requests:
                chosen.heard_s = time.monotonic()
            handed = self._handed[request] = Handed(chosen, next(self._ids), costs[chosen])
            chosen.requests[handed.id] = bursts.setdefault(chosen, {})[handed.id] = request
            chosen.load += _load(request, handed)
            chosen.note_sent(request)
            if len(bursts[chosen]) == BURST:
                chosen.send(pack_requests(bursts.pop(chosen)))
        for each, requests in bursts.items():
            each.send(pack_requests(requests))

    def _take_in(self) -> list[Request]:
        """What one message of each replica brings."""
        progressed = []
        for replica in self._replicas:
            if not replica.inbox:
                continue
            header, arrays = replica.inbox.popleft()
            replica.stats = CoreStats(*header["stats"])
            for _, request, count in read_progress(header, arrays, replica.requests):
                replica.load -= OUTPUT_COST * count
                progressed.append(request)
                if request.finish_reason:
                    self._take_out(request)
        return progressed

    def _take_out(self, request: Request) -> Handed:
        """A request ended, or is to end."""
        request.retired = True
        handed = self._handed.pop(request)
        del handed.replica.requests[handed.id]
        handed.replica.load -= _load(request, handed)
        return handed

    # -- messages and failures --

    def _look(self) -> None:
        """Take in what is there."""
        self._check_failure()
        away_s = time.monotonic() - self._left_s
        for each in self._replicas:
            each.heard_s += away_s if away_s > AWAY_S else 0
        self._listen(0)
        self._left_s = time.monotonic()

    def _listen(self, timeout_s: float | None) -> None:
        """Wait for messages, and take one of each replica. MinisglError when one has failed."""
        by_connection = {each.connection: each for each in self._replicas}
        for connection in wait(list(by_connection), timeout_s):
            assert isinstance(connection, Connection)
            self._read(by_connection[connection])
        now = time.monotonic()
        for each in self._replicas:
            if each.requests and now - each.heard_s > self._limit_s:
                self._fail(each, f"does not answer: a step takes longer than --watchdog-s {self.config.watchdog_s:g}")

    def _read(self, replica: Replica) -> None:
        try:
            replica.read()
        except (EOFError, OSError):
            self._fail(replica, replica.how_it_ended())
        if "failed" in replica.inbox[-1][0]:
            self._fail(replica, "failed: " + replica.inbox[-1][0]["failed"])

    def _answer_of(self, replica: Replica, what: str) -> tuple[dict[str, Any], Ints]:
        """Wait for a message with this key; those before it stay in the inbox."""
        while True:
            for message in replica.inbox:
                if what in message[0]:
                    replica.inbox.remove(message)
                    return message
            self._listen(POLL_S)

    def _fail(self, replica: Replica, how: str) -> NoReturn:
        self._failure = f"replica {self._replicas.index(replica)} {how}"
        self._kill()
        raise MinisglError(self._failure)

    def _check_failure(self) -> None:
        if self._closed:
            raise MinisglError("this LLM is closed: make a new one")
        if self._failure:
            raise MinisglError(f"this LLM is of no more use ({self._failure}): make a new one")

    def _kill(self) -> None:
        for each in self._replicas:
            each.kill()


def _load(request: Request, handed: Handed) -> int:
    """What a replica still has to do for a request, in prompt tokens."""
    return handed.prompt_tokens + OUTPUT_COST * (request.max_total - request.num_tokens)
