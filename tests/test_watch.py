"""A rank other than the first, whose exchange fails because the first one is gone."""

import time
from threading import Thread
from types import SimpleNamespace

import pytest

from minisgl import watch as module
from minisgl.watch import Watch


class GoneStore:
    def set(self, key, value):
        raise RuntimeError("connection reset")


@pytest.fixture
def watch(monkeypatch):
    """Of rank 1; what ends the process only notes it."""
    monkeypatch.setattr(module, "BEAT_S", 60)
    monkeypatch.delenv(module.OF_REPLICA, raising=False)
    monkeypatch.setattr(module.os, "_exit", lambda code: None)
    watch = Watch(SimpleNamespace(place=SimpleNamespace(rank=1, size=2), again=GoneStore))
    yield watch
    watch.close()


def test_the_line_is_out_before_the_process_may_end(watch):
    said = []

    def say(line):
        time.sleep(0.3)  # a machine with too much to do
        said.append(line)

    watch.say = say
    seen = Thread(target=watch.fail, args=["rank 0 is gone"])
    seen.start()
    watch.report(RuntimeError("reset by peer"))  # after it, the process ends
    assert said == ["rank 0 is gone"]
    seen.join()


def test_a_rank_that_is_first_to_find_out_says_so_once(watch, monkeypatch):
    monkeypatch.setattr(module, "REPORT_S", 0)
    said = []
    watch.say = said.append
    watch.report(RuntimeError("reset by peer"))
    assert said == ["rank 0 is gone"]
    watch.fail("rank 0 is gone")
    assert len(said) == 1
