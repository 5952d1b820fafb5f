from itertools import accumulate
from typing import NamedTuple

import pytest
import torch

from minisgl.kernels import invariant_attention as module
from minisgl.kernels import launch
from minisgl.kernels.attention_prefill import attention_prefill_reference, prefill_tiles
from minisgl.kernels.invariant_attention import invariant_decode, invariant_prefill, query_block
from minisgl.kernels.paged import shuffled_page_table, store_in_pages
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)

HAS_GPU = torch.cuda.is_available()
LENGTH = 77  # of a text: with splits of 32 keys and blocks of 16, three splits, the last one cut inside a block
SPLIT = 32


@pytest.fixture
def small_splits(monkeypatch):
    """Several splits in few keys, for the interpreter; a GPU has blocks too large for that."""
    if not HAS_GPU:
        monkeypatch.setattr(module, "SPLIT", SPLIT)


class Text(NamedTuple):
    """Queries, keys and values of some texts of given lengths, in pages. Slots without a key are NaN."""

    queries: list[torch.Tensor]  # [length, H, D] each
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    window: int = 0

    @property
    def scale(self) -> float:
        return self.queries[0].shape[2] ** -0.5

    def prefill(self, parts: dict[int, tuple[int, int]]) -> list[torch.Tensor]:
        """Results of places begin..end-1 of these texts, as one launch."""
        new = [end - begin for begin, end in parts.values()]
        kv_lens = [end for _, end in parts.values()]
        q = torch.cat([self.queries[text][slice(*part)] for text, part in parts.items()])
        out = torch.full_like(q, float("nan"))
        block = query_block(q.shape[2], q.device, q.dtype)
        tiles = torch.from_numpy(prefill_tiles(new, kv_lens, block)).to(q.device)
        index = (self._index(x) for x in (list(parts), [0, *accumulate(new)], kv_lens))
        invariant_prefill(q, *self[1:4], *index, tiles, scale=self.scale, window=self.window, out=out)
        return list(out.split(new))

    def decode(self, places: dict[int, int], max_kv_len: int | None = None) -> list[torch.Tensor]:
        """Results of one place of each of these texts, as one step."""
        q = torch.stack([self.queries[text][place] for text, place in places.items()])
        out = torch.full_like(q, float("nan"))
        kv_lens = [place + 1 for place in places.values()]
        bound = max(kv_lens) if max_kv_len is None else max_kv_len
        index = self._index(list(places)), self._index(kv_lens), bound
        invariant_decode(q, *self[1:4], *index, scale=self.scale, window=self.window, out=out)
        return list(out)

    def expected(self) -> list[torch.Tensor]:
        """In float64."""
        lengths = [len(q) for q in self.queries]
        wide = (x.double() for x in (torch.cat(self.queries), self.k_cache, self.v_cache))
        index = (self._index(x) for x in (list(range(len(lengths))), [0, *accumulate(lengths)], lengths))
        out = attention_prefill_reference(*wide, self.page_table, *index, scale=self.scale, window=self.window)
        return list(out.split(lengths))

    def _index(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.page_table.device)


def make_text(lengths, heads, kv_heads, head_dim, page_size, device, dtype, window=0) -> Text:
    table = shuffled_page_table(lengths, page_size, device)
    k_cache, v_cache = (
        store_in_pages(
            [torch.randn(n, kv_heads, head_dim, device=device, dtype=dtype) for n in lengths], table, page_size
        )
        for _ in range(2)
    )
    queries = [torch.randn(length, heads, head_dim, device=device, dtype=dtype) for length in lengths]
    return Text(queries, k_cache, v_cache, table, window)


def check_every_way(text: Text, assert_close, places: list[int]) -> None:
    """At once, in chunks, and token by token at `places`, beside other texts and alone: the same bits."""
    length = len(text.queries[0])
    others = {other: (0, len(text.queries[other])) for other in range(1, len(text.queries))}
    at_once = text.prefill({0: (0, length), **others})
    for out, expected in zip(at_once, text.expected(), strict=True):
        assert_close(out, expected)
    borders = [0, length // 3, length // 3 + 17, length]
    chunks = [text.prefill({0: chunk})[0] for chunk in zip(borders, borders[1:], strict=False)]
    assert torch.equal(torch.cat(chunks), at_once[0])
    for place in places:
        assert torch.equal(text.decode({0: place})[0], at_once[0][place])
    together = text.decode({0: places[-1], **{other: end - 1 for other, (_, end) in others.items()}}, length + 1000)
    assert torch.equal(together[0], at_once[0][places[-1]])
    assert torch.equal(together[-1], at_once[-1][-1])


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


@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_pages_do_not_change_the_result(device, dtype):
    text, part = make_text([LENGTH], 1, 1, 16, 16, device, dtype), (LENGTH - 10, LENGTH)
    keys, values = (cache[text.page_table[0].long()].flatten(0, 1)[:LENGTH] for cache in text[1:3])
    for page_size in (8, 128):
        table = shuffled_page_table([LENGTH], page_size, device)
        caches = (store_in_pages([x], table, page_size) for x in (keys, values))
        other = Text(text.queries, *caches, table)
        assert torch.equal(other.prefill({0: part})[0], text.prefill({0: part})[0])


def test_the_reference_is_invariant_too(assert_close, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    for window in (0, 40):
        text = make_text([LENGTH, 20], 2, 1, 64, 16, torch.device("cpu"), torch.float32, window)
        check_every_way(text, assert_close, list(range(0, LENGTH, 7)))


@pytest.mark.usefixtures("small_splits")
def test_more_query_heads_than_a_block_has_rows(device, dtype, assert_close):
    heads = 130 if HAS_GPU else 20
    text = make_text([40], heads, 1, 16, 16, device, dtype)
    assert_close(text.decode({0: 39})[0], text.expected()[0][39])


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_padded_rows_are_zero(device, dtype, window):
    text = make_text([LENGTH, 20], 2, 1, 16, 16, device, dtype, window)
    text.page_table[1] = -(2**30)
    out = text.decode({0: LENGTH - 1, 1: -1})
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[0], text.decode({0: LENGTH - 1})[0])


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


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", {"q": torch.zeros(2, 2, 12)}),
        ("k_cache", {"k_cache": torch.zeros(3, 16, 1, 24)}),
        ("rows", {"rows": torch.zeros(1, dtype=torch.int32), "kv_lens": torch.ones(1, dtype=torch.int32)}),
        ("max_kv_len", {"max_kv_len": -1}),
        ("scale", {"scale": 0.0}),
    ],
)
def test_decode_refuses_bad_arguments(name, change):
    index = torch.ones(2, dtype=torch.int32)
    q, cache = torch.zeros(2, 2, 16), torch.zeros(3, 16, 1, 16)
    arguments = dict(q=q, k_cache=cache, v_cache=cache.clone(), page_table=torch.zeros(3, 4, dtype=torch.int32))
    arguments |= dict(rows=index, kv_lens=index, max_kv_len=1, scale=1.0, out=torch.zeros(2, 2, 16))
    with pytest.raises(ValueError, match=f"^{name}:"):
        invariant_decode(**{**arguments, **change})


@pytest.mark.parametrize("name", ["cu_seqlens", "tiles"])
def test_prefill_refuses_bad_arguments(name):
    index = torch.ones(2, dtype=torch.int32)
    q, cache = torch.zeros(2, 2, 16), torch.zeros(3, 16, 1, 16)
    arguments = dict(q=q, k_cache=cache, v_cache=cache.clone(), page_table=torch.zeros(3, 4, dtype=torch.int32))
    arguments |= dict(rows=index, cu_seqlens=torch.arange(3).int(), kv_lens=index, scale=1.0, out=torch.zeros(2, 2, 16))
    arguments |= dict(tiles=torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"^{name}:"):
        invariant_prefill(**{**arguments, name: torch.zeros(1, dtype=torch.int32)})


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
