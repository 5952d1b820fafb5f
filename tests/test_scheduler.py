"""The scheduler against a simulated device whose KV slots remember what was stored in them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.page_pool import PagePool
from minisgl.radix_cache import RadixCache
from minisgl.request import Request, SamplingParams
from minisgl.scheduler import Scheduler, Step

PAGE = 4
EOS = 3


def make_request(index: int, prompt: list[int], max_tokens: int = 8) -> Request:
    return Request(index, prompt, SamplingParams(), len(prompt) + max_tokens, frozenset([EOS]))


def next_token(tokens) -> int:
    """A deterministic 'model': depends on the whole text, gives EOS now and then."""
    return hash(tuple(int(token) for token in tokens)) % 7 % 4


class Device:
    """Remembers, for each KV slot, the text up to the token whose KV it holds: reads must find their own prefix.

    As on a real device, sampled tokens are written to the row, and a decoding row reads its input there.
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.page_table: dict[tuple[int, int], int] = {}
        self.rows: dict[int, list[int]] = {}

    def run(self, step: Step) -> np.ndarray:
        for row, place, page in step.page_updates:
            self.page_table[row, place] = page
        for chunk in step.chunks:
            self.rows[chunk.request.row] = chunk.request.tokens[: chunk.start + chunk.count].tolist()
        lengths = [request.length for request in step.decodes]
        assert lengths == sorted(lengths, reverse=True)
        spans = [(r, r.length - 1, r.length, r.length - 1) for r in step.decodes]
        spans += [(c.request, c.start, c.start + c.count, c.store_from) for c in step.chunks]
        for request, start, end, store_from in spans:
            for position in range(max(start, store_from), end):
                self.slots[self._slot(request, position)] = tuple(self.rows[request.row][: position + 1])
        for request, _, end, _ in spans:  # a layer stores everything before it attends
            assert len(self.rows[request.row]) == end
            for position in range(end):
                assert self.slots.get(self._slot(request, position)) == tuple(self.rows[request.row][: position + 1])
        for request in step.sampled:
            self.rows[request.row].append(next_token(self.rows[request.row]))
        return np.array([self.rows[request.row][-1] for request in step.sampled], np.int32)

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        page = self.page_table[request.row, position // PAGE]
        assert page == request.pages[position // PAGE]
        return page, position % PAGE


def check(scheduler: Scheduler) -> None:
    """Every page has one owner; locks are exactly the running requests'."""
    pool, cache = scheduler.pool, scheduler.cache
    owned = list(pool._free)
    for request in scheduler.running:
        owned += request.pages[request.num_shared :]
    locks: dict[int, int] = {}
    if cache:
        for node in cache.nodes():
            owned += node.pages
        for request in scheduler.running:
            node = scheduler._nodes[request]
            assert node.depth == request.num_shared * PAGE
            while node.parent is not None:
                locks[id(node)] = locks.get(id(node), 0) + 1
                node = node.parent
        assert all(node.locks == locks.get(id(node), 0) for node in cache.nodes())
    assert sorted(owned) == list(range(pool.num_pages))
    rows = [request.row for request in scheduler.running] + scheduler._free_rows
    assert len(set(rows)) == len(rows)


def build(num_pages: int, max_running: int, max_step_tokens: int, cached: bool) -> Scheduler:
    pool = PagePool(num_pages, PAGE)
    return Scheduler(pool, RadixCache(PAGE) if cached else None, max_running, max_step_tokens)


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12),
    num_pages=st.integers(8, 30),
    max_running=st.integers(1, 6),
    extra_budget=st.integers(0, 30),
    cached=st.booleans(),
    overlap=st.booleans(),
    failures=st.sets(st.integers(0, 30), max_size=3),
    aborts=st.sets(st.tuples(st.integers(0, 30), st.booleans()), max_size=3),
)
def test_every_request_ends_with_its_own_text(
    jobs, num_pages, max_running, extra_budget, cached, overlap, failures, aborts
):
    """Any arrival order, pool, budget, failed steps and aborts: right text, one owner a page, nothing leaks."""
    scheduler = build(num_pages, max_running, max_running + PAGE + extra_budget, cached)
    device = Device()
    arrivals = [(arrival, make_request(i, prompt, n)) for i, (prompt, n, arrival) in enumerate(jobs)]
    requests = [request for _, request in arrivals]
    aborted: set[Request] = set()
    in_flight: list[tuple[Step, np.ndarray]] = []

    def abort(number: int, launched: bool) -> None:
        if (number, launched) in aborts and scheduler.running:
            victim = next(iter(scheduler.running))
            scheduler.retire(victim)
            aborted.add(victim)

    for number in range(2000):
        for arrival, request in arrivals:
            if arrival == number:
                scheduler.add(request)
        abort(number, False)
        step = scheduler.schedule()
        check(scheduler)
        assert step.num_tokens <= scheduler.max_step_tokens
        if step.num_tokens and number in failures:
            for failed in [step, *(launched for launched, _ in reversed(in_flight))]:
                scheduler.roll_back(failed)
            in_flight.clear()
            check(scheduler)
            continue
        if step.num_tokens:
            in_flight.append((step, device.run(step)))
        elif not in_flight:
            assert not scheduler.num_unfinished, "work is left but the step is empty"
            if number > 6:
                break
        abort(number, True)  # two steps are in flight, and what the first has sampled is not known
        if in_flight and (not overlap or not step.num_tokens or len(in_flight) > 1):
            for request in scheduler.complete(*in_flight.pop(0)):
                if request.finish_reason:
                    scheduler.retire(request)
        check(scheduler)
    else:
        raise AssertionError("the requests did not end")

    for (prompt, max_tokens, _), request in zip(jobs, requests, strict=True):
        if request not in aborted:
            assert request.output_ids == expected_output(prompt, max_tokens)
            assert 0 <= request.cached_tokens < len(prompt)
        assert request.num_pending == 0
    if scheduler.cache:
        scheduler.pool.free(scheduler.cache.clear())
    assert scheduler.pool.num_free == num_pages


def run_all(scheduler: Scheduler, device: Device, requests: list[Request]) -> list[Step]:
    for request in requests:
        scheduler.add(request)
    steps = []
    while scheduler.num_unfinished:
        step = scheduler.schedule()
        steps.append(step)
        for request in scheduler.complete(step, device.run(step)):
            if request.finish_reason:
                scheduler.retire(request)
    return steps


def test_a_page_whose_last_token_is_not_known_is_not_kept():
    """Aborted with two steps in flight: the second stores the keys of a token that the first is still sampling."""
    scheduler, device = build(num_pages=8, max_running=1, max_step_tokens=100, cached=True), Device()
    request = make_request(0, [0] * (PAGE - 2))
    scheduler.add(request)
    step = scheduler.schedule()
    scheduler.complete(step, device.run(step))
    in_flight = [(step := scheduler.schedule(), device.run(step)) for _ in range(2)]
    assert request.length == PAGE > request.num_tokens
    scheduler.retire(request)
    assert scheduler.cache.num_pages == 0
    for launched in in_flight:
        assert scheduler.complete(*launched) == []
    assert scheduler.pool.num_free == 8


def test_followers_in_the_same_step_share_their_leaders_prefix():
    scheduler = build(num_pages=100, max_running=8, max_step_tokens=200, cached=True)
    prompts = [[1] * 40 + [0, tail] for tail in range(3)]
    requests = [make_request(i, prompt, 1) for i, prompt in enumerate(prompts)]
    first = run_all(scheduler, Device(), requests)[0]
    assert [(chunk.start, chunk.count) for chunk in first.chunks] == [(0, 42), (40, 2), (40, 2)]
    assert [request.cached_tokens for request in requests] == [0, 40, 40]


def test_a_prompt_found_whole_computes_one_token_and_stores_nothing():
    scheduler = build(num_pages=100, max_running=8, max_step_tokens=200, cached=True)
    twins = [make_request(i, [1, 0] * 8, 1) for i in range(2)]
    first = run_all(scheduler, Device(), twins)[0]
    assert (first.chunks[1].start, first.chunks[1].count, first.chunks[1].store_from) == (15, 1, 16)
    assert twins[1].cached_tokens == 15


def test_a_long_prompt_is_chunked_while_others_decode():
    scheduler = build(num_pages=100, max_running=4, max_step_tokens=16, cached=True)
    device = Device()
    short, long = make_request(0, [1, 1, 2], 8), make_request(1, [0, 2] * 30, 2)
    steps = run_all(scheduler, device, [short, long])
    mixed = [step for step in steps if step.decodes and step.chunks]
    assert mixed, "no step decoded beside a chunk"
    assert all(chunk.count % PAGE == 0 or chunk.samples for step in steps for chunk in step.chunks)


def test_preemption_keeps_the_text():
    scheduler = build(num_pages=8, max_running=4, max_step_tokens=32, cached=True)
    prompts = [[tail, 1, 1, 0] for tail in range(3)]
    requests = [make_request(i, prompt, 20) for i, prompt in enumerate(prompts)]
    for request in requests:
        request.stop_ids = frozenset()
    run_all(scheduler, Device(), requests)
    assert scheduler.num_preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        tokens = list(prompt)
        while len(tokens) < 24:
            tokens.append(next_token(tokens))
        assert request.output_ids == tokens[4:]


def test_pages_found_by_a_request_that_gets_no_chunk_are_known_to_the_device_or_given_back():
    """The step fails in which it found them: an older request took the whole budget."""
    text = [index * 7 % 50 for index in range(10 * PAGE)]
    scheduler, table = build(num_pages=60, max_running=4, max_step_tokens=5 * PAGE, cached=True), {}
    older, follower = make_request(0, [99] * PAGE, 200), make_request(2, text)
    leader = Request(1, text[: 6 * PAGE], SamplingParams(), 6 * PAGE + 1, frozenset(), pooling="mean")
    for request in (older, leader, follower):
        scheduler.add(request)

    def launch() -> Step:
        step = scheduler.schedule()
        table.update({(row, place): page for row, place, page in step.page_updates})
        for request in scheduler.complete(step, np.full(len(step.sampled), 5, np.int32)):
            if request.finish_reason:
                scheduler.retire(request)
        return step

    launch(), launch()
    scheduler.extend(older, [5] * 100)
    failed = scheduler.schedule()
    assert [chunk.request for chunk in failed.chunks] == [older] and failed.page_updates
    scheduler.roll_back(failed)
    while not follower.retired:
        launch()
        if follower.pages:
            assert [table[follower.row, place] for place in range(len(follower.pages))] == follower.pages


def test_a_budget_that_starves_prompts_is_refused():
    with pytest.raises(AssertionError, match="starve"):
        build(num_pages=8, max_running=16, max_step_tokens=16, cached=True)
