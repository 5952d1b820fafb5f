import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisgl import planner
from minisgl.planner import neighbour_prefix_lengths, plan_order
from minisgl.request import Request, SamplingParams

CPU = torch.device("cpu")


def request(index: int, prompt: list[int], max_tokens: int = 8) -> Request:
    return Request(index, prompt, SamplingParams(), len(prompt) + max_tokens, frozenset())


def test_shared_prefixes_become_neighbours():
    prefixes = {name: [name] * 32 for name in (7, 300, 70_000)}
    jobs = [(name, prefixes[name] + [tail]) for tail in range(5) for name in prefixes]
    random.Random(0).shuffle(jobs)
    requests = [request(i, prompt) for i, (_, prompt) in enumerate(jobs)]
    ordered = plan_order(requests, 16, CPU)
    names = [jobs[one.index][0] for one in ordered]
    assert sorted(map(str, names)) == sorted(str(name) for name, _ in jobs)
    assert sum(a != b for a, b in zip(names, names[1:], strict=False)) == len(prefixes) - 1


def test_the_longest_work_starts_first():
    requests = [request(i, [i] * 20, max_tokens) for i, max_tokens in enumerate([5, 50, 20])]
    assert [one.index for one in plan_order(requests, 16, CPU)] == [1, 2, 0]


def test_a_prefix_shorter_than_a_page_is_no_group():
    requests = [request(0, [1] * 15 + [2], 5), request(1, [9] * 16, 10), request(2, [1] * 15 + [3], 20)]
    assert [one.index for one in plan_order(requests, 16, CPU)] == [2, 1, 0]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=2, max_size=8))
def test_neighbour_prefix_lengths(prompts):
    found = neighbour_prefix_lengths([np.array(prompt, np.int32) for prompt in prompts], CPU)
    for length, a, b in zip(found, prompts[:-1], prompts[1:], strict=True):
        assert a[:length] == b[:length]
        assert length == min(len(a), len(b)) or a[length] != b[length]


@pytest.mark.gpu
def test_the_kernel_finds_the_same_lengths(monkeypatch):
    rng = random.Random(1)
    prompts = sorted([rng.choice([0, 1])] * rng.randrange(1, 4000) + [2] for _ in range(150))
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    expected = neighbour_prefix_lengths(arrays, CPU)
    monkeypatch.setattr(planner, "common_prefix_length", None)  # the host's
    assert (neighbour_prefix_lengths(arrays, torch.device("cuda", 0)) == expected).all()
