"""Prefill and decode of the attention that sums in one order: the same bits, and those of the reference nearly."""

import pytest
import torch

from minisgl.kernels import invariant_attention as module
from minisgl.kernels import launch
from minisgl.kernels.invariant_decode import invariant_decode
from tests.kernels.invariant_texts import (
    HAS_GPU,
    LENGTH,
    check_every_way,
    make_text,
    small_splits,  # noqa: F401 (a fixture)
)
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, page_size, window",
    [
        (2, 1, 64, 16, 0),
        (2, 1, 24, 8, 40),
        *([(32, 8, 128, 64, 0), (16, 8, 128, 16, 800), (8, 8, 256, 128, 0), (28, 4, 80, 64, 700)] * HAS_GPU),
    ],
)
@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_every_way_gives_the_same_bits(device, dtype, assert_close, heads, kv_heads, head_dim, page_size, window):
    lengths = [3001, 700, 5] if HAS_GPU else [LENGTH, 5]
    places = [0, 63, 64, 511, 512, 1023, 1600, 3000] if HAS_GPU else [0, 31, 32, LENGTH - 1]
    text = make_text(lengths, heads, kv_heads, head_dim, page_size, device, dtype, window)
    check_every_way(text, assert_close, places)


def test_the_reference_is_invariant_too(assert_close, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    for window in (0, 40):
        text = make_text([LENGTH, 20], 2, 1, 64, 16, torch.device("cpu"), torch.float32, window)
        check_every_way(text, assert_close, list(range(0, LENGTH, 7)))


@pytest.mark.usefixtures("small_splits")
def test_keys_before_the_window_are_never_read(device, dtype, assert_close):
    text = make_text([LENGTH], 2, 1, 16, 16, device, dtype, window=30)
    expected = text.expected()[0][LENGTH - 4 :]
    for key in range(LENGTH - 3 - 30):
        for cache in text[1:3]:
            cache[text.page_table[0, key // 16], key % 16] = float("nan")
    text.page_table[0, : (LENGTH - 3 - 30) // 16] = -(2**30)
    assert_close(text.prefill({0: (LENGTH - 4, LENGTH)})[0], expected)
    assert_close(text.decode({0: LENGTH - 1})[0], expected[-1])


def test_nothing_to_do(device, dtype):
    text = make_text([5], 2, 1, 16, 16, device, dtype)
    q, index = text.queries[0][:0], torch.zeros(0, dtype=torch.int32, device=device)
    invariant_decode(q, *text[1:4], index, index, 0, scale=1.0, out=q.clone())
    assert text.prefill({0: (5, 5)})[0].shape == (0, 2, 16)


def test_splits_are_whole_blocks_of_every_tile():
    for tiles in (*module.TILES.values(), module.SAFE_TILES, module.FP32_TILES):
        assert set(tiles) == {64, 128, 256}
        assert all(module.SPLIT % tile.block_n == 0 for tile in tiles.values())


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_every_place_of_a_long_text(device, assert_close, page_size):
    """What rests on the hardware: each place of a block, blocks that are masked in part, and every count of splits."""
    text = make_text([2200, 900], 32, 8, 128, page_size, device, torch.bfloat16)
    at_once = text.prefill({0: (0, 2200), 1: (0, 900)})
    for place in range(2200):
        places = {0: place, 1: place % 900} if place % 2 else {0: place}
        together = text.decode(places, max_kv_len=2200)
        assert torch.equal(together[0], at_once[0][place])
        if len(together) > 1:
            assert torch.equal(together[1], at_once[1][place % 900])
    for chunk in (1, 2, 63, 64, 65, 127, 500, 512, 1000):
        chunks = [text.prefill({0: (begin, min(begin + chunk, 2200))})[0] for begin in range(0, 2200, max(chunk, 50))]
        for begin, out in zip(range(0, 2200, max(chunk, 50)), chunks, strict=True):
            assert torch.equal(out, at_once[0][begin : begin + len(out)])
