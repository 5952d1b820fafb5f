"""Against `attention_decode` without it, whose bits it makes; that one is checked against float64."""

import pytest
import torch

from minisgl.kernels import attention_decode as plain
from minisgl.kernels import persistent_decode as module
from tests.kernels.test_attention_decode import Problem, make_problem


def both(problem: Problem, monkeypatch: pytest.MonkeyPatch, window: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What this kernel makes, and what a program for each split makes."""
    results = []
    for many in (1, 1 << 60):
        monkeypatch.setattr(plain, "MANY", many)
        results.append(problem.launch(window))
    return results[0], results[1]


@pytest.mark.parametrize("programs", [1, 3, 8])
@pytest.mark.parametrize(
    "kv_lens, heads, kv_heads, head_dim, page_size, window",
    [
        ([4, 63, 64, 65, 2], 4, 2, 64, 16, 0),
        ([1, 700, 33, 0, 129, 0], 3, 1, 80, 64, 0),
        ([600, 1, 257, 512], 4, 2, 32, 256, 0),
        ([0, 40, 130, 0, 333, 800], 2, 1, 16, 16, 100),
        ([0, 0, 0], 2, 2, 16, 64, 0),
    ],
)
def test_same_bits(device, dtype, monkeypatch, programs, kv_lens, heads, kv_heads, head_dim, page_size, window):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "LENGTHS", 4)
    problem = make_problem([max(length, 1) for length in kv_lens], heads, kv_heads, head_dim, page_size, device, dtype)
    problem.kv_lens.copy_(torch.tensor(kv_lens))
    for sequence, length in enumerate(kv_lens):
        if not length:
            problem.rows[sequence] = -(2**30)
    found, expected = both(problem, monkeypatch, window)
    assert not found.isnan().any()
    assert torch.equal(found, expected)


def test_a_sequence_over_several_shares(device, dtype, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 12)
    found, expected = both(make_problem([2100, 512, 60], 2, 2, 16, 64, device, dtype), monkeypatch)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 3000])
def test_every_tile(device, dtype, monkeypatch, page_size, head_dim, window):
    lengths = [4096, 1, 100, 257, 0, 1000, 2048, 2049, *range(3, 1500, 17), 9000]
    problem = make_problem([max(length, 1) for length in lengths], 8, 2, head_dim, page_size, device, dtype)
    problem.kv_lens.copy_(torch.tensor(lengths))
    found, expected = both(problem, monkeypatch, window)
    assert torch.equal(found, expected)
    assert torch.equal(found, both(problem, monkeypatch, window)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 5, 16])
@pytest.mark.parametrize("batch", [1, 255, 257, 700])
def test_groups_and_batches(device, monkeypatch, group, batch):
    lengths = [(index * 37) % 600 for index in range(batch)]
    problem = make_problem([max(length, 1) for length in lengths], group, 1, 128, 64, device, torch.bfloat16)
    problem.kv_lens.copy_(torch.tensor(lengths))
    found, expected = both(problem, monkeypatch)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_batches_and_lengths_do_not_recompile(device, monkeypatch):
    monkeypatch.setattr(plain, "MANY", 1)
    problem = make_problem([400, 9, 300], 2, 1, 64, 16, device, torch.float16)
    problem.launch()
    kernels = (module._persistent_decode_kernel, module._combine_cut_kernel)
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in kernels]
    before = [len(cache) for cache in caches]
    tail = problem._replace(q=problem.q[1:], rows=problem.rows[1:], kv_lens=problem.kv_lens[1:])
    tail.launch()
    tail.launch(max_kv_len=16 * 1024)
    assert [len(cache) for cache in caches] == before
