"""The feeder works ahead by two bursts and no more, and never holds up the end of a run."""

import threading
import time
from collections.abc import Iterator

from minisgl.batch_run.feeder import Feeder


def wait_until_idle(read: list[int]) -> None:
    before = -1
    while len(read) != before:
        before = len(read)
        time.sleep(0.05)


def test_it_holds_two_bursts() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            yield item

    feeder: Feeder[int, str] = Feeder(items(), lambda chunk: [str(item) for item in chunk], 100)
    taken: list[str] = []
    while not feeder.exhausted:
        wait_until_idle(read)
        assert len(read) <= len(taken) + 200
        burst = feeder.take(wait=True)
        assert len(burst) in (0, 100)
        taken += burst
    assert taken == [str(item) for item in range(1000)]
    feeder.close()


def test_it_does_not_wait_for_input_that_does_not_come() -> None:
    block = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        block.wait()

    feeder: Feeder[int, int] = Feeder(items(), list, 10)
    started = time.monotonic()
    assert feeder.take(wait=False) == [] and feeder.take(wait=True) == []
    feeder.close()
    assert time.monotonic() - started < 10  # 0.6 s, where nothing else runs
    block.set()
