"""Several engines that share one queue: the answers of one, work in the right place, and an end when one fails."""

import signal
import time
from dataclasses import replace
from multiprocessing.connection import Pipe

import pytest

from minisgl import LLM, MinisglError, SamplingParams, replicas
from minisgl.core import CoreStats
from minisgl.plan import pack, unpack
from minisgl.replica import Replica
from minisgl.replica_messages import pack_ids, pack_progress, unpack_requests
from tests.test_tp import MANY, SMALL, _other_ranks_run_references, answers, expected, folder  # noqa: F401


def until(condition, limit_s=30):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it never held"
        time.sleep(0.01)


def without_cached(found):
    return [(choices, ids, replace(usage, cached_tokens=0)) for choices, ids, usage in found]


def test_answers_are_those_of_one_engine(folder, expected):  # noqa: F811
    with LLM(folder, **SMALL, dp=2) as llm:
        ids, top_ids, *numbers = answers(llm)
        ranks = llm.core._replicas
        assert all(each.stats.cached for each in ranks), "one of them did nothing"
        assert llm.core.stats().capacity == 2 * SMALL["num_pages"] * SMALL["page_size"]
        # What waits comes back, from the queue and from the replicas; what runs goes on.
        params = SamplingParams(**{**MANY, "max_tokens": 100})
        requests = [llm.new_request([index] * 30, params, index=index) for index in range(30)]
        llm.submit(requests)
        while llm.core.stats().running < 2:
            llm.step()
        dropped = llm.drop_waiting()
        assert 30 - 2 * SMALL["max_running"] <= len(dropped) < 30
        llm.reset_prefix_cache()
        ended = set()
        while llm.num_unfinished:
            ended |= {request for request, _ in llm.step()}
        assert ended == set(requests) - set(dropped)
        until(lambda: llm.core.check() or llm.core.stats().running == 0)
        ranks[1].process.kill()
        with pytest.raises(MinisglError, match=r"^replica 1 was killed by signal 9$"):
            llm.generate([[1, 2, 3], [4, 5]])
        with pytest.raises(MinisglError, match=r"replica 1 was killed by signal 9\): make a new one"):
            llm.generate([1, 2, 3])
    assert (without_cached(ids), top_ids) == (without_cached(expected[0]), expected[1])
    for found, of_one in zip(numbers, expected[2:], strict=True):
        assert found == pytest.approx(of_one, rel=1e-4, abs=1e-5)
    assert all(each.process.returncode == -signal.SIGKILL for each in ranks)
    with pytest.raises(MinisglError, match="this LLM is closed"):
        llm.generate([1, 2, 3])


class FarEnd:
    """A replica that says what the test wants, and remembers what it is sent."""

    def __init__(self):
        self.near, self.connection = Pipe()
        self.requests = {}

    def ready(self, config):
        self.connection.send_bytes(pack({"ready": config}))

    def receive(self):
        """The indices of the requests that came, in the order of their prompts."""
        while self.connection.poll(0.2):
            header, arrays = unpack(self.connection.recv_bytes())
            if "submit" in header:
                self.requests |= unpack_requests(header, arrays, frozenset(), None)
            elif "abort" in header:
                for id in arrays.tolist():
                    del self.requests[id]
        return sorted(int(request.tokens[0]) for request in self.requests.values())

    def finish(self, *first_tokens):
        ended = [(id, one) for id, one in self.requests.items() if one.tokens[0] in first_tokens]
        for id, request in ended:
            del self.requests[id]
            request.append(7)
            request.finish_reason = "length"
        stats = CoreStats(running=len(self.requests))
        self.connection.send_bytes(pack_progress([(id, one, 0) for id, one in ended], stats))


@pytest.fixture
def far_ends(folder, monkeypatch):  # noqa: F811
    """An LLM of two replicas that are not there, which run two requests each, and what is in their place."""
    ends = [FarEnd(), FarEnd()]
    config = {**SMALL, "max_running": 2, "num_pages": 1000}

    def start(resolved):
        for end in ends:
            end.ready({**vars(resolved), "num_pages": 1000, "dp": 1})
        return [Replica(end.near, None) for end in ends]

    monkeypatch.setattr(replicas, "start_replicas", start)
    with LLM(folder, **config, dp=2, watchdog_s=1) as llm:
        yield llm, ends
        for end in ends:
            end.connection.close()  # or they would be waited for


def submit(llm, *prompts, max_tokens=4):
    requests = [
        llm.new_request(prompt, SamplingParams(max_tokens=max_tokens), index=index)
        for index, prompt in enumerate(prompts)
    ]
    llm.submit(requests)
    return requests


def test_shared_prefixes_stay_together_and_nobody_gets_far_more(far_ends):
    llm, (one, two) = far_ends
    a, b = [1] * 160, [2] * 160
    submit(llm, a, b)
    assert (one.receive(), two.receive()) == ([1], [2])
    one.finish(1), two.finish(2)
    while llm.num_unfinished:
        llm.step()
    submit(llm, b + [5], a + [6])
    assert (one.receive(), two.receive()) == ([1], [2]), "they went where their prefix is"
    submit(llm, a + [7])
    assert (one.receive(), two.receive()) == ([1, 1], [2])
    submit(llm, [3] * 20, max_tokens=2)
    assert two.receive() == [2, 3], "a new prompt goes where the least is to be done"
    *_, last = submit(llm, *([index] for index in range(10, 18)), max_tokens=2)
    assert len(one.receive()) == len(two.receive()) == 3 and llm.num_unfinished == 12, "the others wait here"
    assert llm.core.stats().waiting == 6
    llm.abort(last)
    two.finish(2, 3)
    ended = llm.step()
    assert len(ended) == 2 and [result.finish_reason for _, result in ended] == ["length"] * 2
    assert len(two.receive()) == 3 and llm.core.stats().waiting == 3


def test_a_prompt_leaves_its_prefix_for_a_replica_that_is_far_less_busy(far_ends):
    llm, (one, two) = far_ends
    submit(llm, [1] * 64, max_tokens=60)
    submit(llm, [1] * 65, max_tokens=2)
    assert (one.receive(), two.receive()) == ([1], [1])


def test_one_that_is_silent_or_gone_ends_the_job_in_one_line(far_ends):
    llm, (one, two) = far_ends
    submit(llm, [1] * 20)
    time.sleep(1.2)  # the caller's own time does not count
    one.receive(), one.finish()
    assert llm.core.step() == []
    with pytest.raises(MinisglError, match=r"^replica 0 does not answer: a step takes longer than --watchdog-s 1$"):
        llm.generate([1, 2, 3])


def test_the_cause_that_a_replica_names_is_passed_on(far_ends):
    llm, (one, two) = far_ends
    requests = submit(llm, [1] * 20, [2] * 20)
    stream = llm.stream([4, 5])
    two.receive()
    two.connection.send_bytes(pack_ids("dropped", []))
    two.connection.send_bytes(pack({"failed": "rank 1 was killed by signal 9"}))
    with pytest.raises(MinisglError, match=r"^replica 1 failed: rank 1 was killed by signal 9$"):
        while True:
            llm.core.check()
    assert not any(request.finish_reason for request in requests)
    with pytest.raises(MinisglError, match="make a new one"):
        next(stream)
    llm.close()
    assert llm.num_unfinished == 0 and {request.finish_reason for request in requests} == {"abort"}
    llm.abort(requests[0])


def test_refusals(folder):  # noqa: F811
    with pytest.raises(MinisglError, match="dp is 0"):
        LLM(folder, dp=0)
