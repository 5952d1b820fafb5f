import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.page_pool import PagePool


@given(st.integers(1, 40), st.lists(st.integers(-5, 10), max_size=40))
def test_no_page_is_given_twice_and_none_is_lost(num_pages, moves):
    pool = PagePool(num_pages, page_size=16)
    held: list[int] = []
    for move in moves:
        if move >= 0:
            held += pool.allocate(min(move, pool.num_free))
        else:
            pool.free([held.pop() for _ in range(min(-move, len(held)))])
        assert len(set(held)) == len(held)
        assert pool.num_free + len(held) == num_pages
    pool.free(held)
    assert sorted(pool.allocate(num_pages)) == list(range(num_pages))


def test_pages_for_rounds_up():
    pool = PagePool(4, page_size=16)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_freeing_twice_is_caught():
    pool = PagePool(2, page_size=16)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)
