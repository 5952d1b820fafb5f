"""Sums over ranks that are processes with shared memory, through the interpreter: regions, their turns, late ranks.

The interpreter's loads and stores are those of a CPU, in order: what is not seen here is the memory order of GPUs.
`bench/all_reduce.py` checks sums on them.
"""

import numpy as np
import pytest
import torch
import triton

from minisgl.kernels.all_reduce import (
    PeerMemory,
    gather_of_ranks,
    sum_and_norm,
    sum_and_norm_reference,
    sum_into_stream_reference,
    sum_of_ranks,
    sum_of_ranks_reference,
)
from tests.rank_scripts import SUMS, terms
from tests.ranks import run_ranks

# That interpreter takes an array of one element for a number, which numpy does no longer.
TOO_OLD = triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.skipif(TOO_OLD, reason="the interpreter of Triton 3.6 does not work with numpy 2.4")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sums(num_ranks, tmp_path, assert_close):
    all_found = run_ranks("sums", num_ranks, tmp_path, tmp_path, environment=[("TRITON_INTERPRET", "1")])
    for step, (rows, hidden, dtype) in enumerate(SUMS):
        parts = [terms(step, rank, rows, hidden, dtype)[0].double() for rank in range(num_ranks)]
        _, residual, weight = (x.double() for x in terms(step, 0, rows, hidden, dtype))
        found = [of_rank[step] for of_rank in all_found]
        for of_rank in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(of_rank, found[0], strict=True)), f"other bits in {step}"
        if step % 4 == 3:
            own = torch.stack([terms(step, rank, rows, hidden, dtype)[0] for rank in range(num_ranks)])
            assert torch.equal(found[0][0].view(torch.uint8), own.view(torch.uint8))  # any bits
        elif len(found[0]) == 1:
            assert_close(found[0][0], sum_of_ranks_reference(parts))
        elif len(found[0]) == 2:
            expected = sum_and_norm_reference(parts, residual, weight, 1e-6)
            assert_close(found[0][0], expected)
            assert_close(found[0][1], residual)
        else:
            stream = sum_into_stream_reference(parts, residual if step % 4 == 1 else None, weight, 1e-6)
            assert_close(found[0][0], stream.residual)
            assert_close(found[0][1], stream.scaled)
            torch.testing.assert_close(found[0][2].sum(1).double(), stream.squares.squeeze(1), rtol=1e-2, atol=0)
    kinds = {len(of_step) for of_step in all_found[0]}
    assert kinds == {1, 2, 3}  # every launcher took part


def test_a_rank_alone_waits_for_nobody(device, assert_close):
    if device.type == "cpu" and TOO_OLD:
        pytest.skip("the interpreter of Triton 3.6 does not work with numpy 2.4")
    memory = PeerMemory.alone(device, num_ranks=4, rank=2)
    x, weight = torch.randn(3, 701, device=device), torch.randn(701, device=device)
    x[0] = -0.0
    for _ in range(4):
        assert torch.equal(sum_of_ranks(x.clone(), memory), 4 * x)
        assert torch.equal(gather_of_ranks(x, memory), x.expand(4, *x.shape))
    expected = sum_and_norm_reference([x.double()] * 4, torch.zeros_like(x).double(), weight.double(), 1e-6)
    assert_close(sum_and_norm(x, torch.zeros_like(x), weight, 1e-6, memory), expected)
    memory.one_shot_bytes = 0
    sum_of_ranks(x, memory)  # each rank has a share of it
