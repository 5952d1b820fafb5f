import pytest
import torch

from minisgl.kernels.invariant_decode import invariant_decode
from tests.kernels.invariant_texts import HAS_GPU, LENGTH, make_text, small_splits  # noqa: F401 (a fixture)
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 (a fixture)


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
def test_refuses_bad_arguments(name, change):
    index = torch.ones(2, dtype=torch.int32)
    q, cache = torch.zeros(2, 2, 16), torch.zeros(3, 16, 1, 16)
    arguments = dict(q=q, k_cache=cache, v_cache=cache.clone(), page_table=torch.zeros(3, 4, dtype=torch.int32))
    arguments |= dict(rows=index, kv_lens=index, max_kv_len=1, scale=1.0, out=torch.zeros(2, 2, 16))
    with pytest.raises(ValueError, match=f"^{name}:"):
        invariant_decode(**{**arguments, **change})
