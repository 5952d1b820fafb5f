import pytest
import torch

from minisgl.kernels.invariant_prefill import invariant_prefill
from minisgl.kernels.paged import shuffled_page_table, store_in_pages
from tests.kernels.invariant_texts import LENGTH, Text, make_text, small_splits  # noqa: F401 (a fixture)
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)


@pytest.mark.usefixtures("small_splits", "ordered_dot")
def test_pages_do_not_change_the_result(device, dtype):
    text, part = make_text([LENGTH], 1, 1, 16, 16, device, dtype), (LENGTH - 10, LENGTH)
    keys, values = (cache[text.page_table[0].long()].flatten(0, 1)[:LENGTH] for cache in text[1:3])
    for page_size in (8, 128):
        table = shuffled_page_table([LENGTH], page_size, device)
        caches = (store_in_pages([x], table, page_size) for x in (keys, values))
        other = Text(text.queries, *caches, table)
        assert torch.equal(other.prefill({0: part})[0], text.prefill({0: part})[0])


@pytest.mark.parametrize("name", ["cu_seqlens", "tiles"])
def test_refuses_bad_arguments(name):
    index = torch.ones(2, dtype=torch.int32)
    q, cache = torch.zeros(2, 2, 16), torch.zeros(3, 16, 1, 16)
    arguments = dict(q=q, k_cache=cache, v_cache=cache.clone(), page_table=torch.zeros(3, 4, dtype=torch.int32))
    arguments |= dict(rows=index, cu_seqlens=torch.arange(3).int(), kv_lens=index, scale=1.0, out=torch.zeros(2, 2, 16))
    arguments |= dict(tiles=torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"^{name}:"):
        invariant_prefill(**{**arguments, name: torch.zeros(1, dtype=torch.int32)})
