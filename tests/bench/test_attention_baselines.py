"""The baselines of attention do the work that the kernels do; those of packages that are not there are left out."""

from importlib.util import find_spec

import pytest
import torch

from minisgl.bench import attention_baselines
from minisgl.bench.attention_baselines import _page_index, dense_prefill, lazily, paged_decode, paged_prefill
from minisgl.kernels.paged import shuffled_page_table

CPU = torch.device("cpu")


def test_lazily_sets_up_once() -> None:
    calls: list[str] = []

    def build() -> object:
        calls.append("build")
        return lambda: calls.append("launch")

    run = lazily(build)
    assert calls == []
    run()
    run()
    assert calls == ["build", "launch", "launch"]


@pytest.mark.parametrize("cached", [0, 13])
def test_torch_and_its_masks_agree(cached: int) -> None:
    """torch's attention over dense keys sees what a causal mask by hand sees, cached keys too."""
    torch.manual_seed(0)
    baselines = dense_prefill(2, 20, cached, 4, 2, 16, 0.25, CPU)
    assert ("cuDNN, dense" in baselines) == (cached == 0)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 20, 16, dtype=torch.bfloat16).float()
    k, v = torch.randn(2, 2, 2, 20 + cached, 16, dtype=torch.bfloat16).float().repeat_interleave(2, dim=2).unbind()
    hidden = torch.ones(20, 20 + cached).triu(cached + 1).bool()
    expected = (q @ k.mT * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    got = baselines["torch sdpa, dense"]()
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)  # bf16


def test_pages_as_flashinfer_wants_them() -> None:
    kv_lens = [64, 1, 130]
    table = shuffled_page_table(kv_lens, 64, CPU)
    offsets, ids, last = _page_index(table, torch.tensor(kv_lens, dtype=torch.int32), 64)
    assert offsets.tolist() == [0, 1, 2, 5] and last.tolist() == [64, 1, 2]
    assert ids.tolist() == [*table[0, :1], *table[1, :1], *table[2, :3]]
    assert {x.dtype for x in (offsets, ids, last)} == {torch.int32}


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 4, 16)
    cache = torch.randn(3, 64, 2, 16)
    table, lens = shuffled_page_table([64, 70], 64, CPU), torch.tensor([64, 70], dtype=torch.int32)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    monkeypatch.setattr(attention_baselines, "find_spec", lambda name: None)
    assert paged_prefill(q, cache, cache, table, offsets, lens, 0.25) == {}
    assert paged_decode(q, cache, cache, table, lens, 0.25) == {}
    monkeypatch.setattr(attention_baselines, "find_spec", lambda name: name == "flashinfer" or None)
    baselines = paged_decode(q, cache, cache, table, lens, 0.25)
    assert list(baselines) == ["FlashInfer"]
    if not find_spec("flashinfer"):
        with pytest.raises(ImportError):
            baselines["FlashInfer"]()
