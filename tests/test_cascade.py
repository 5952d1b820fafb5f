from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.cascade import BREAK_EVEN_BYTES_PER_KEY, CascadePlan, CascadePlanner
from minisgl.kernels.attention_cascade import CascadeTiles, max_tiles, min_members
from minisgl.kernels.decode_splits import split_size
from minisgl.page_pool import PagePool
from minisgl.radix_cache import RadixCache
from minisgl.request import Request, SamplingParams
from minisgl.scheduler import Scheduler

ALWAYS_WORTH_IT = 1 << 60  # bytes of a token's keys and values


@dataclass
class Row:
    """What the planner reads of a request."""

    pages: list[int]
    num_shared: int
    length: int


def check(plan: CascadePlan, decodes: list, page_size: int, tile_members: int) -> None:
    """A plan is what `CascadeTiles` says of tiles."""
    assert len(plan.shared_splits) == len(decodes)
    assert plan.members.shape == (len(plan.tile_splits), tile_members)
    assert len(plan.tile_splits) <= max_tiles(len(decodes), tile_members)
    in_tile = []
    for splits, row in zip(plan.tile_splits.tolist(), plan.members.tolist(), strict=True):
        members = [member for member in row if member >= 0]
        assert row == members + [-1] * (tile_members - len(members))
        assert splits > 0 and len(members) >= min_members(tile_members)
        sizes = {split_size(decodes[member].length) for member in members}
        assert len(sizes) == 1, "members of a tile have different splits"
        keys = splits * sizes.pop()
        assert len({tuple(decodes[member].pages[: keys // page_size]) for member in members}) == 1, "other pages"
        for member in members:
            assert keys <= decodes[member].num_shared * page_size
            assert keys < decodes[member].length, "the last split has the newest key: it is the row's own"
            assert plan.shared_splits[member] == splits
        in_tile += members
    assert len(set(in_tile)) == len(in_tile), "a row is in two tiles"
    assert set(np.flatnonzero(plan.shared_splits)) == set(in_tile)


@st.composite
def batches(draw) -> tuple[list[Row], int]:
    """Rows whose shared pages are paths of a random tree, and the page size."""
    page_size = draw(st.sampled_from([16, 64, 256]))
    pages_of_1k = 1024 // page_size
    next_page = iter(range(10**9))
    paths: list[list[int]] = [[]]
    for _ in range(draw(st.integers(0, 6))):
        parent = paths[draw(st.integers(0, len(paths) - 1))]
        paths.append(parent + [next(next_page) for _ in range(draw(st.integers(1, 2 * pages_of_1k)))])
    rows = []
    for _ in range(draw(st.integers(0, 40))):
        path = paths[draw(st.integers(0, len(paths) - 1))]
        length = len(path) * page_size + draw(st.integers(1, 1500))
        own = [next(next_page) for _ in range(-(-length // page_size) - len(path))]
        rows.append(Row(path + own, len(path), length))
    return rows, page_size


@settings(max_examples=300, deadline=None)
@given(batch=batches(), tile_members=st.sampled_from([2, 3, 4, 8, 12, 32]))
def test_plans_are_right_and_miss_nothing(batch, tile_members):
    rows, page_size = batch
    plan = CascadePlanner(tile_members, page_size, ALWAYS_WORTH_IT).plan(rows)
    if plan is not None:
        check(plan, rows, page_size, tile_members)
    alone: dict[tuple[int, tuple[int, ...]], int] = {}  # rows outside every tile, by their first split
    for place, row in enumerate(rows):
        size = split_size(row.length)
        has_split = page_size <= size <= row.num_shared * page_size and size < row.length
        if has_split and (plan is None or not plan.shared_splits[place]):
            first = (size, tuple(row.pages[: size // page_size]))
            alone[first] = alone.get(first, 0) + 1
    assert all(count < min_members(tile_members) for count in alone.values()), "enough rows for a tile are in none"


@settings(max_examples=50, deadline=None)
@given(batch=batches(), tile_members=st.sampled_from([2, 8]), padding=st.integers(0, 20))
def test_packed_plans_are_unpacked_by_the_kernel(batch, tile_members, padding):
    rows, page_size = batch
    plan = CascadePlanner(tile_members, page_size, ALWAYS_WORTH_IT).plan(rows)
    if plan is None:
        return
    size = len(rows) + padding
    tiles = CascadeTiles.unpack(torch.from_numpy(plan.packed(size)), size, tile_members)
    used = len(plan.tile_splits)
    assert tiles.shared_splits.tolist() == plan.shared_splits.tolist() + [0] * padding
    assert tiles.tile_splits[:used].tolist() == plan.tile_splits.tolist() and not tiles.tile_splits[used:].any()
    assert tiles.members[:used].tolist() == plan.members.tolist()


def family(count: int, prefix: int, own: int = 100, page_size: int = 64, first_page: int = 0) -> list[Row]:
    """Rows that share a prefix of whole pages."""
    shared = prefix // page_size
    own_pages = -(-own // page_size)
    prefix_pages = list(range(first_page, first_page + shared))
    starts = [first_page + shared + i * own_pages for i in range(count)]
    return [Row([*prefix_pages, *range(start, start + own_pages)], shared, prefix + own) for start in starts]


def test_rows_go_where_they_share_most():
    """16 rows share 512 keys; 8 of them share 1,024."""
    rows = family(16, 512, own=600)
    for row in rows[4:12]:
        row.pages[8:16] = range(1000, 1008)
        row.num_shared = 16
    plan = CascadePlanner(8, 64, ALWAYS_WORTH_IT).plan(rows)
    assert plan is not None
    assert plan.shared_splits.tolist() == [2] * 4 + [4] * 8 + [2] * 4


def test_tiles_are_filled_evenly():
    plan = CascadePlanner(8, 64, ALWAYS_WORTH_IT).plan(family(18, 1024))
    assert plan is not None
    assert (plan.members >= 0).sum(1).tolist() == [6, 6, 6]


def test_only_what_pays_is_planned():
    """Saved bytes are those of every member but one in a tile; the launch costs the time of one split."""
    for prefix, splits, split in ((1024, 4, 256), (4096, 4, 1024)):
        rows = family(8, prefix)
        break_even = split * BREAK_EVEN_BYTES_PER_KEY // (7 * splits * split)
        assert CascadePlanner(8, 64, break_even).plan(rows) is None
        assert CascadePlanner(8, 64, break_even + 1).plan(rows) is not None
    assert CascadePlanner(8, 64, ALWAYS_WORTH_IT).plan(family(1, 1024)) is None
    assert CascadePlanner(8, 64, ALWAYS_WORTH_IT).plan([]) is None


def test_a_plan_stays_until_something_changes():
    rows = family(9, 1024, own=1000)
    planner = CascadePlanner(8, 64, ALWAYS_WORTH_IT)
    plan = planner.plan(rows)
    for row in rows:
        row.length += 24
        row.pages.append(row.pages[-1] + 10_000)
    assert planner.plan(rows) is plan, "at 2,048 keys splits are still short"
    rows[3].length += 1
    crossed = planner.plan(rows)
    assert crossed is not None and crossed is not plan
    assert crossed.shared_splits.tolist() == [4] * 3 + [0] + [4] * 5
    assert planner.plan(rows) is crossed
    left = planner.plan(rows[:-1])
    assert left is not None and len(left.shared_splits) == 8
    rows[0].pages = [page + 50_000 for page in rows[0].pages]  # it was preempted, and its prefix was computed again
    back = planner.plan(rows[:-1])
    assert back is not None and back.shared_splits[0] == 0


@pytest.mark.parametrize("num_pages", [2000, 260])  # the second does not hold all requests at once
def test_plans_of_a_running_scheduler(num_pages):
    """Requests come, grow over 2,048 keys, are preempted and leave; what they share is found, and really shared."""
    page_size, tile_members = 16, 4
    random = np.random.default_rng(0)
    prefixes = [random.integers(0, 100, length) for length in (300, 1100, 2000)]
    scheduler = Scheduler(PagePool(num_pages, page_size), RadixCache(page_size), max_running=20, max_step_tokens=2000)
    waiting = []
    for index in range(24):
        prompt = np.concatenate([prefixes[index % 3], random.integers(0, 100, int(random.integers(1, 60)))])
        total = len(prompt) + int(random.integers(20, 60))
        waiting.append(Request(index, prompt, SamplingParams(), total, frozenset()))
    planner = CascadePlanner(tile_members, page_size, ALWAYS_WORTH_IT)
    page_table: dict[tuple[int, int], int] = {}
    planned = crossed = 0
    while waiting or scheduler.num_unfinished:
        if waiting:
            scheduler.add(waiting.pop())
        step = scheduler.schedule()
        page_table.update({(row, place): page for row, place, page in step.page_updates})
        plan = planner.plan(step.decodes)
        for request in step.decodes:
            stored = [page_table[request.row, place] for place in range(len(request.pages))]
            assert stored == request.pages, "the kernel reads other pages than were planned for"
        if plan is not None:
            check(plan, step.decodes, page_size, tile_members)
            planned += 1
            crossed += any(step.decodes[place].length > 2048 for place in np.flatnonzero(plan.shared_splits))
        for request in scheduler.complete(step, np.zeros(len(step.sampled), np.int32)):
            if request.finish_reason:
                scheduler.retire(request)
    assert planned > 20 and crossed > 0
    assert (scheduler.num_preemptions > 0) == (num_pages == 260)
