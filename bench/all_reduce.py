"""Check sums over the GPUs of one machine, and time them beside NCCL's: one process a GPU,

    torchrun --nproc-per-node 2 -m minisgl.bench.all_reduce --json bench/results/all_reduce.jsonl

First every launcher is checked at every size, on ranks that are late by turns, eagerly and in a graph that is replayed:
against float64, and for the same bits on all ranks. Then each is timed in a graph of many launches, as decode runs it.
`minisgl bench kernels` has one GPU, and so no case of it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from minisgl.bench.harness import Case, environment, write_rows
from minisgl.kernels.all_reduce import (
    EMPTY,
    PeerMemory,
    gather_of_ranks,
    sum_and_norm,
    sum_into_stream,
    sum_of_ranks,
)
from minisgl.kernels.rms_norm import rms_norm
from minisgl.parallel import ProcessGroup, start_processes, stop_processes

HIDDEN = 4096
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # 8 KB to 8 MB of bf16
EPS = 1e-6
CHECKS, REPLAYS = 20, 20  # of each size
LAUNCHES, SAMPLES = 50, 21  # in a timed graph; replays, of which the median counts
LATE_CYCLES = 200_000  # 0.1 ms: longer than any launch


def cases(device: torch.device) -> Iterator[Case]:
    """None: one GPU has no other to add to."""
    return iter(())


@click.command()
@click.option("--json", "json_path", type=Path, help="Append the rows to this file.")
def main(json_path: Path | None) -> None:
    """Check and time sums over the GPUs of one machine."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    _, num_ranks = start_processes("cuda", timeout_s=120)
    group = ProcessGroup(device, num_ranks)
    if group.peers is None:
        raise click.ClickException("the GPUs have no memory in common; see the warning above")
    check(group, group.peers, device)
    rows = [row for num_rows in ROWS for row in measured(group, group.peers, num_rows, device)]
    if group.ranks.rank == 0:
        for row in rows:
            print(f"{row['op']:16} {row['shape']:20} {row['graph_us']:7.1f} us   NCCL {row['nccl_graph_us']:7.1f} us")
        if json_path is not None:
            write_rows(json_path, rows)
    group.close()
    stop_processes()


def shot_bytes(memory: PeerMemory) -> tuple[int, int]:
    """`one_shot_bytes` for one shot, where that fits, and for two."""
    return memory.max_one_shot_bytes, 0


def check(group: ProcessGroup, memory: PeerMemory, device: torch.device) -> None:
    """Raise AssertionError where a launcher is wrong, or ranks differ."""
    usual = memory.one_shot_bytes
    for num_rows in ROWS:
        weight = _random(num_rows, (HIDDEN,), device)
        for one_shot_bytes in (usual, *shot_bytes(memory)):
            memory.one_shot_bytes = one_shot_bytes
            for number in range(CHECKS):
                parts = [_random((number, rank), (num_rows, HIDDEN), device) for rank in range(group.size)]
                residual = _random(number, (num_rows, HIDDEN), device)
                _check_once(group, memory, parts, residual, weight, late=number % (group.size + 1))
        memory.one_shot_bytes = usual
        _check_replays(group, memory, num_rows, device)
    if group.ranks.rank == 0:
        print(f"sums of {group.size} ranks are right, and the same on all")


def _check_once(
    group: ProcessGroup,
    memory: PeerMemory,
    parts: list[torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    late: int,
) -> None:
    own = parts[group.ranks.rank]
    expected = torch.stack([part.double() for part in parts]).sum(0)
    if group.ranks.rank == late:
        torch.cuda._sleep(LATE_CYCLES)
    _compare(group, sum_of_ranks(own.clone(), memory), expected)
    added, total = residual.clone(), residual.double() + expected
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    if memory.holds_at_once(own):
        _compare(group, sum_and_norm(own, added, weight, EPS, memory), normed)
        _compare(group, added, total)
    if len(own) <= 16:
        stream = sum_into_stream(own, residual.clone(), weight, EPS, memory)
        _compare(group, stream.residual, total)
        _compare(group, stream.scaled, total * weight.double())
        _compare(group, stream.squares.sum(1), total.square().sum(1))
    if not memory.holds_words(own):
        return
    if group.ranks.rank == late:
        torch.cuda._sleep(LATE_CYCLES)
    words = torch.stack(parts).view(torch.int32)
    words[..., ::5] = EMPTY.value  # where a sum would have a zero
    assert torch.equal(gather_of_ranks(words[group.ranks.rank], memory), words)


def _check_replays(group: ProcessGroup, memory: PeerMemory, num_rows: int, device: torch.device) -> None:
    """Four sums in a graph, replayed without a pause: the first takes another of the three regions in each replay."""
    x, weight = _random(group.ranks.rank, (num_rows, HIDDEN), device), _random(0, (HIDDEN,), device)
    residual = torch.zeros_like(x)

    def run() -> None:
        for scale in (1.0, 2.0, -8.0, 4.0):
            if memory.holds_at_once(x):
                sum_and_norm(x * scale, residual, weight, EPS, memory)
            else:
                residual.add_(sum_of_ranks(x * scale, memory))

    graph = _captured(run)
    residual.zero_()
    for replay in range(REPLAYS):
        if group.ranks.rank == replay % (group.size + 1):
            torch.cuda._sleep(LATE_CYCLES)
        graph.replay()
    total = sum(_random(rank, (num_rows, HIDDEN), device).double() for rank in range(group.size))
    assert isinstance(total, torch.Tensor)
    _compare(group, residual, -REPLAYS * total, tolerance=5e-2)  # 80 roundings to bf16


def _compare(group: ProcessGroup, found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-2) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < tolerance, f"{list(found.shape)}: relative error {error:.1e}"
    bits = found.contiguous().view(torch.int32 if found.itemsize == 4 else torch.int16).long()
    digest = (bits * torch.arange(1, bits.numel() + 1, device=bits.device).view_as(bits)).sum()
    digests = torch.empty(group.size, dtype=torch.int64, device=bits.device)
    torch.distributed.all_gather_into_tensor(digests, digest[None])
    assert bool((digests == digest).all()), f"{list(found.shape)}: ranks differ"


def measured(group: ProcessGroup, memory: PeerMemory, num_rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one size: both ways to sum, and the sums that go on."""
    x, residual = (_random(group.ranks.rank + seed, (num_rows, HIDDEN), device) for seed in (0, group.size))
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    size, usual = x.nbytes, memory.one_shot_bytes
    shape = f"{size >> 10} KB, {group.size} ranks"

    def nccl() -> None:
        torch.distributed.all_reduce(x)

    def nccl_and_norm() -> None:
        torch.distributed.all_reduce(x)
        rms_norm(x, weight, EPS, residual)

    def row(op: str, run: Callable[[], object], baseline_us: float) -> dict[str, Any]:
        figures = {"graph_us": round(_graph_us(run), 2), "nccl_graph_us": round(baseline_us, 2)}
        return {"bench": "all_reduce", "op": op, "shape": shape, "bytes": size, **figures, **environment(device)}

    nccl_us, nccl_and_norm_us = _graph_us(nccl), _graph_us(nccl_and_norm)
    for name, one_shot_bytes in zip(("one shot", "two shots"), shot_bytes(memory), strict=True):
        memory.one_shot_bytes = one_shot_bytes
        if name == "one shot" and size > one_shot_bytes:
            continue
        yield row(name, lambda: sum_of_ranks(x, memory), nccl_us)
        if memory.holds_at_once(x):
            yield row("sum_and_norm", lambda: sum_and_norm(x, residual, weight, EPS, memory), nccl_and_norm_us)
    memory.one_shot_bytes = usual
    if num_rows <= 16:
        run = lambda: sum_into_stream(x, residual, weight, EPS, memory)  # noqa: E731
        yield row("sum_into_stream", run, nccl_and_norm_us)


def _graph_us(run: Callable[[], object]) -> float:
    """Median microseconds of a launch in a graph of many; the same number of them on every rank."""
    graph = _captured(lambda: [run() for _ in range(LAUNCHES)])
    times = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.distributed.barrier()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / LAUNCHES)
    return sorted(times)[SAMPLES // 2]


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _random(seed: int | tuple[int, int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    number = seed if isinstance(seed, int) else 1000 * (seed[0] + 1) + seed[1]
    generator = torch.Generator(device).manual_seed(number)
    return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)


if __name__ == "__main__":
    main()
