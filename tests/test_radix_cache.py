"""The prefix tree against a plain dictionary from whole prefixes to pages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.radix_cache import RadixCache, common_prefix_length

PAGE = 4


def check(cache: RadixCache) -> None:
    """What holds after every operation."""
    nodes = list(cache.nodes())
    pages = [page for node in nodes for page in node.pages]
    assert len(set(pages)) == len(pages) == cache.num_pages
    assert cache.num_evictable == sum(len(node.pages) for node in nodes if not node.locks)
    for node in nodes:
        assert node.parent is not None and node.parent.locks >= node.locks
        assert len(node.key) == len(node.pages) * PAGE > 0
        assert node.depth == node.parent.depth + len(node.key)
        assert node.parent.children[node.key[:PAGE].tobytes()] is node


def path(tokens) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]


# Few distinct tokens and pages of one repeated token, so that prefixes meet.
texts = st.lists(st.integers(0, 2), max_size=6).map(lambda pages: np.repeat(np.array(pages, np.int32), PAGE))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), texts),
        st.tuples(st.just("match"), texts),
        st.tuples(st.just("lock"), texts),
        st.tuples(st.just("unlock"), st.integers(0, 9)),
        st.tuples(st.just("evict"), st.integers(0, 6)),
        st.tuples(st.just("forget"), texts),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(operations, st.sampled_from(["lru", "lfu", "fifo"]))
def test_against_a_dictionary(operations, policy):
    cache = RadixCache(PAGE, policy)
    known: dict[tuple[int, ...], int] = {}
    locked: list[tuple[object, np.ndarray]] = []
    fresh = iter(range(10_000))

    def insert(tokens):
        node, found = cache.match(tokens)
        new = [next(fresh) for _ in range(len(tokens) // PAGE - len(found))]
        cache.insert(node, tokens, new)
        known.update(zip(path(tokens)[len(found) :], new, strict=True))

    for operation, argument in operations:
        if operation == "insert":
            insert(argument)
        elif operation == "match":
            node, pages = cache.match(argument)
            expected = [known[prefix] for prefix in path(argument) if prefix in known]
            assert pages == expected and node.depth == len(expected) * PAGE
        elif operation == "lock":
            node, _ = cache.match(argument)
            cache.lock(node)
            locked.append((node, argument[: node.depth]))
        elif operation == "unlock" and locked:
            node, _ = locked.pop(argument % len(locked))
            cache.unlock(node)
        elif operation == "evict":
            free = cache.num_evictable
            gone = cache.evict(argument)
            assert len(gone) == min(argument, free)
            known = {prefix: page for prefix, page in known.items() if page not in set(gone)}
            kept = {prefix for _, tokens in locked for prefix in path(tokens)}
            assert kept <= set(known), "a locked prefix was evicted"
        elif operation == "forget":
            before = dict(known)
            stamp = cache.stamp()
            insert(argument)
            check(cache)
            cache.forget_since(stamp)
            known = before
        check(cache)

    for node, _ in locked:
        cache.unlock(node)
    cache.clear()
    assert cache.num_pages == cache.num_evictable == 0


def test_duplicates_stay_with_the_caller():
    cache = RadixCache(PAGE)
    tokens = np.arange(12, dtype=np.int32)
    cache.insert(cache.root, tokens, [1, 2])
    node, duplicates = cache.insert(cache.root, tokens, [7, 8, 9])
    assert duplicates == [7, 8]
    assert cache.match(tokens) == (node, [1, 2, 9])


@pytest.mark.parametrize("policy, first", [("lru", 2), ("lfu", 2), ("fifo", 1)])
def test_policies(policy, first):
    cache = RadixCache(PAGE, policy)
    texts = [np.full(PAGE, token, np.int32) for token in (1, 2, 3)]
    for page, text in enumerate(texts, start=1):
        cache.insert(cache.root, text, [page])
    for text in (texts[0], texts[0], texts[2]):
        cache.count_use(cache.match(text)[0])
    assert cache.evict(1) == [first]


def test_what_is_looked_for_in_vain_is_not_used():
    cache = RadixCache(PAGE, "lfu")
    inner, _ = cache.insert(cache.root, np.arange(PAGE, dtype=np.int32), [1])
    leaf, _ = cache.insert(inner, np.arange(2 * PAGE, dtype=np.int32), [2])
    for _ in range(5):
        cache.match(np.arange(2 * PAGE, dtype=np.int32))
    assert (inner.uses, leaf.uses) == (0, 0)
    cache.count_use(leaf, inner)
    assert (inner.uses, leaf.uses) == (0, 1)
    cache.count_use(leaf)
    assert (inner.uses, leaf.uses) == (1, 2)


def test_eviction_trims_a_leaf_from_its_end():
    cache = RadixCache(PAGE)
    tokens = np.arange(16, dtype=np.int32)
    cache.insert(cache.root, tokens, [1, 2, 3, 4])
    assert sorted(cache.evict(3)) == [2, 3, 4]
    assert cache.match(tokens)[1] == [1]
    check(cache)


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix_length(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix_length(np.array(a, np.int32), np.array(b, np.int32)) == expected
