"""Texts in pages, for both kernels of the attention that sums in one order."""

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch

from minisgl.kernels import invariant_attention, invariant_decode, invariant_prefill
from minisgl.kernels.attention_prefill import attention_prefill_reference, prefill_tiles
from minisgl.kernels.paged import shuffled_page_table, store_in_pages

HAS_GPU = torch.cuda.is_available()
LENGTH = 77  # of a text: with splits of 32 keys and blocks of 16, three splits, the last one cut inside a block
SPLIT = 32


@pytest.fixture
def small_splits(monkeypatch):
    """Several splits in few keys, for the interpreter; a GPU has blocks too large for that."""
    if not HAS_GPU:
        for module in (invariant_attention, invariant_decode):
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
        block = invariant_attention.query_block(q.shape[2], q.device, q.dtype)
        tiles = torch.from_numpy(prefill_tiles(new, kv_lens, block)).to(q.device)
        index = (self._index(x) for x in (list(parts), [0, *accumulate(new)], kv_lens))
        invariant_prefill.invariant_prefill(q, *self[1:4], *index, tiles, scale=self.scale, window=self.window, out=out)
        return list(out.split(new))

    def decode(self, places: dict[int, int], max_kv_len: int | None = None) -> list[torch.Tensor]:
        """Results of one place of each of these texts, as one step."""
        q = torch.stack([self.queries[text][place] for text, place in places.items()])
        out = torch.full_like(q, float("nan"))
        kv_lens = [place + 1 for place in places.values()]
        bound = max(kv_lens) if max_kv_len is None else max_kv_len
        index = self._index(list(places)), self._index(kv_lens), bound
        invariant_decode.invariant_decode(q, *self[1:4], *index, scale=self.scale, window=self.window, out=out)
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
