"""A thread that reads, parses and tokenizes ahead of the engine, so that the device does not wait for the host.

Knows bursts of things to prepare. Does not know what they are. At most two bursts are held here: one ready, one being
made. Encoding lets other threads run; between small chunks everything else does too.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

CHUNK_ITEMS = 64  # prepared in one call: a millisecond or two between the chances of the engine's thread to run
POLL_S = 0.1  # how often waiting threads look whether to give up


class Feeder(Generic[Item, Made]):
    """Bursts of `size` prepared items, in order; the last one may be smaller."""

    def __init__(self, items: Iterator[Item], prepare: Callable[[Sequence[Item]], list[Made]], size: int):
        self._items, self._prepare, self._size = items, prepare, size
        self._ready: Queue[list[Made] | BaseException | None] = Queue(maxsize=1)
        self._failure: Exception | None = None  # of reading
        self._closing = Event()
        self.exhausted = False
        self._thread = Thread(target=self._feed, name="feeder", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> list[Made]:
        """The next burst. Empty when none is ready: with `wait` only after a moment, or when there is none any more,
        which `exhausted` says. Raises what reading or preparing raised, once all that came before it is taken."""
        if self.exhausted:
            return []
        try:
            burst = self._ready.get(block=wait, timeout=POLL_S if wait else None)
        except Empty:
            return []
        if burst is None or isinstance(burst, BaseException):
            self.exhausted = True
        if isinstance(burst, BaseException):
            raise burst
        return burst or []

    def close(self) -> None:
        """Stop reading. A thread that waits for input is left behind: it ends with the process."""
        self._closing.set()
        self._thread.join(timeout=5 * POLL_S)

    def _feed(self) -> None:
        try:
            while burst := self._make():
                self._hand_over(burst)
                if len(burst) < self._size:
                    break
            self._hand_over(self._failure)
        except BaseException as error:
            self._hand_over(error)

    def _make(self) -> list[Made]:
        burst: list[Made] = []
        while len(burst) < self._size and not self._closing.is_set() and not self._failure:
            chunk: list[Item] = []
            try:
                chunk.extend(islice(self._items, min(CHUNK_ITEMS, self._size - len(burst))))
            except Exception as error:  # the chunk has the items before it
                self._failure = error
            if not chunk:
                break
            burst += self._prepare(chunk)
        return burst

    def _hand_over(self, burst: list[Made] | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(burst, timeout=POLL_S)
                return
            except Full:
                continue
