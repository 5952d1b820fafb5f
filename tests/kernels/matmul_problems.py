"""Arguments of matmuls, and what finds one that reads or writes before the kernels that it depends on have ended."""

from collections.abc import Callable

import pytest
import torch

HAS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_sm90 = pytest.mark.skipif(not HAS_SM90, reason="needs an sm_90 GPU")


def make_problem(
    rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x  # [M, K], weight  # [N, K], bias  # [N], of sums near 1."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    return x, weight, torch.randn(outputs, device=device, dtype=dtype)


def check_chain(chain: Callable[[Callable[[], object]], None], out: torch.Tensor) -> None:
    """Launches through shared buffers leave the same bits in `out` one by one and in a graph, where kernels start while
    others run. `chain` makes them, and calls its argument after each."""
    chain(torch.cuda.synchronize)
    one_by_one = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, one_by_one)


def check_chain_of_matmuls(matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int) -> None:
    """`check_chain` of matmul(x, weight), each of which reads what the one before it wrote."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    shapes = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
    weights = [make_problem(1, *shape, device, dtype)[1] for shape in shapes * 7]
    start = torch.randn(rows, 1024, device=device, dtype=dtype)
    x = torch.empty_like(start)

    def chain(after_each: Callable[[], object]) -> None:
        x.copy_(start)
        y = x
        for weight in weights:
            y = matmul(y[:, : weight.shape[1]], weight)
            after_each()
        x.copy_(y)

    check_chain(chain, x)
