"""Signs of life between the ranks of a job, so that one that is killed, stopped or hangs ends all of them.

A thread of each rank writes a beat to the store, and reads the others': the first rank looks at all of them, the
others at the first. When the first rank finds that one has failed, whoever steps is told by an exception; where that
cannot be, since it waits for a device or a rank that will never answer, the process says so in one line and ends.

Knows the store and the processes. Does not know what is computed, but for how many exchanges each rank has begun.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minisgl.errors import MinisglError
from minisgl.processes import FAILED, OF_REPLICA, Followers, Meeting, is_of_torchrun

BEAT_S = 0.5
SILENT_S = 15.0  # without a beat: stopped, or its machine is gone
START_S = 180.0  # until the first beat: importing torch takes long on a busy machine
REPORT_S = 2.0  # for the first rank to see that another one has ended, before those that this made fail
EXPLAIN_S = 5.0  # for the cause of an exchange that failed to be known, and for whoever waits to notice


class Watch:
    """The thread of one rank. `progress`: a number that grows with each exchange that this rank begins."""

    def __init__(self, meeting: Meeting, followers: Followers | None = None) -> None:
        self.place = meeting.place
        self.progress: Callable[[], int] = lambda: 0
        self.failure: str | None = None  # of the job, once it is known
        self.say: Callable[[str], object] = print_failure  # before this process ends, where nobody else says why
        self._store = meeting.again()
        self._followers = followers
        self._failing = threading.Lock()
        self._known = threading.Event()  # there is a failure
        self._told = threading.Event()  # whoever steps knows it
        self._ended = threading.Event()
        self._busy = self._joining = False
        self._deadline_s = float("inf")  # by time.monotonic, of what is done now
        self._limit_s = 0.0
        now = time.monotonic()
        watched = range(1, self.place.size) if self.place.rank == 0 else range(1)
        self._seen_s = dict.fromkeys(watched, now)
        self._beats: dict[int, bytes] = {}
        self._looked_s = now
        for work in (self._run, self._guard):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    @contextmanager
    def busy(self, limit_s: float = float("inf"), *, joining: bool = False) -> Iterator[None]:
        """Around what other ranks take part in, and may take so long. `joining`: they come together by it.
        MinisglError when one has failed."""
        self.check()
        self._limit_s, self._deadline_s, self._busy = limit_s, time.monotonic() + limit_s, True
        self._joining = joining
        try:
            yield
        finally:
            self._busy, self._deadline_s = False, float("inf")

    def check(self) -> None:
        """MinisglError when a rank has failed."""
        if self.failure:
            self._told.set()
            raise MinisglError(self.failure)

    def explain(self, error: BaseException) -> str:
        """Why the first rank cannot go on: what befell another one, or its own error."""
        self._told.set()
        if not is_out_of_memory(error):
            self._known.wait(EXPLAIN_S)
        own = f"rank 0 failed: {describe(error)}"
        if is_of_torchrun() and not isinstance(error, MinisglError) and not is_out_of_memory(error):
            own += "; where another rank ended first, torchrun says below which one and how"
        self.failure = self.failure or own
        return self.failure

    def report(self, error: Exception) -> None:
        """Tell the first rank why this one ends; last, where it may be because another one did."""
        if not is_out_of_memory(error) and not isinstance(error, MinisglError):
            self._known.wait(REPORT_S)
        try:
            self._store.set(f"failed/{self.place.rank}", describe(error))
        except RuntimeError:  # no first rank is left to hear it
            self.fail("rank 0 is gone")

    def _run(self) -> None:
        number = 0
        while not self._ended.wait(BEAT_S):
            number += 1
            self._looked_s = time.monotonic()
            try:
                self._store.set(f"beat/{self.place.rank}", f"{number} {self.progress()}")
                failure = next(filter(None, map(self._look, self._seen_s)), None) or self._late()
            except RuntimeError:  # the store went with the process that kept it
                failure = "rank 0 is gone"
            if failure and not self._ended.is_set():
                self.fail(failure)
                return

    def _guard(self) -> None:
        """The store does not answer while the process that keeps it is stopped, and then `_run` waits."""
        while not self._ended.wait(BEAT_S):
            if time.monotonic() - self._looked_s > SILENT_S and not self.failure:
                self.fail(f"rank 0 has shown no sign of life for {SILENT_S:.0f} s: it is stopped")
                return

    def _look(self, rank: int) -> str | None:
        """What is wrong with a rank."""
        if self._store.check([f"failed/{rank}"]):
            return f"rank {rank} failed: {self._store.get(f'failed/{rank}').decode()}"
        how = self._followers.ended(rank) if self._followers else None
        if how:
            return f"rank {rank} {how}"
        beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
        now = time.monotonic()
        if beat != self._beats.get(rank, b""):
            self._beats[rank], self._seen_s[rank] = beat, now
        silent_s = now - self._seen_s[rank]
        if silent_s > (SILENT_S if rank in self._beats else START_S):
            return f"rank {rank} has shown no sign of life for {silent_s:.0f} s: it is stopped, or its machine is gone"
        return None

    def _late(self) -> str | None:
        if time.monotonic() < self._deadline_s:
            return None
        if self._joining:
            return f"the processes did not come together within {self._limit_s:.0f} s"
        counts = {rank: int(beat.split()[1]) for rank, beat in self._beats.items()} | {0: self.progress()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == len(counts):
            who = f"the devices of ranks 0 to {len(counts) - 1} do"
        else:
            who = " and ".join(f"rank {rank}" for rank in sorted(behind)) + " does"
        return f"{who} not answer: a step takes longer than --watchdog-s {self._limit_s:g}"

    def fail(self, failure: str) -> None:
        """End the job; called in threads beside the one that steps, of which the first says why."""
        with self._failing:
            if self._known.is_set():
                return
            self.failure = failure
            if self.place.rank == 1 and OF_REPLICA not in os.environ:  # one line, and not one of each rank
                self.say(failure)
            self._known.set()  # last: who waits for it may end the process at once
        if self.place.rank != 0:
            os._exit(FAILED)
        if self._busy and not self._told.wait(EXPLAIN_S) and self._busy:
            if self._followers:
                self._followers.kill()
            self.say(failure)
            os._exit(FAILED)


def print_failure(failure: str) -> None:
    """On stderr, where nobody else does."""
    print(f"Error: {failure}", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    """The cause in one line."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, MinisglError):
        return first_line
    if is_out_of_memory(error):
        return (
            "out of memory: lower --memory-fraction, --num-pages, --max-step-tokens or --max-running "
            f"({first_line[:200]})"
        )
    return f"{type(error).__name__}: {first_line}"
