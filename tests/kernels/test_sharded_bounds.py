import pytest
import torch

from minisgl.kernels import launch
from minisgl.kernels.sharded_bounds import Samples, Slice, bounds
from minisgl.kernels.vocab_blocks import summarize_blocks
from tests.kernels.sharded_ranks import ROWS, asked


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize("num_ids, padding", [(1000, 24), (63, 1), (4160, 0)])
def test_bounds_of_a_slice(device, dtype, num_ids, padding, interpret, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(launch, "INTERPRET", interpret)
    logits = 4 * torch.randn(ROWS, num_ids + padding, generator=torch.Generator().manual_seed(num_ids))
    logits = logits.to(dtype).to(device)
    logits[:, num_ids:] = 99
    samples, of = Samples(*asked(device, filters=True)), Slice(64, num_ids, 10 * num_ids)
    summaries = summarize_blocks(logits, samples.rows, samples.temperature, num_ids)
    found = bounds(*summaries, logits, of, samples).double()
    truth = logits[:, :num_ids].double()
    for place, row in enumerate(samples.rows.tolist()):
        if row < 0:
            continue
        largest, mass, kth = found[place]
        top_k, temperature = int(samples.top_k[row]), float(samples.temperature[row])
        assert largest == truth[place].max()
        if temperature > 0:
            expected = torch.exp((truth[place] - largest) / temperature).sum()
            torch.testing.assert_close(mass, expected, rtol=1e-4, atol=0)
        assert top_k > 0 or kth == -torch.inf
        assert kth == -torch.inf or (truth[place] >= kth).sum() >= top_k
        assert kth > -torch.inf or not 0 < top_k <= len(summaries[0][0])
