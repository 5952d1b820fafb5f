"""The matmul of `--deterministic` at the shapes of Qwen3-8B, bf16, each launch with another copy of the weight, beside
torch and, where rows are few, the kernel that it replaces."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.bench.tuning import Tuning
from minisgl.kernels.invariant_matmul import ANY, TILES, Tile, bucket_of, invariant_matmul
from minisgl.kernels.skinny_matmul import row_borders, skinny_matmul

# N, K of qkv, o, gate and up, down; the LM head reads few rows, and the last prompt token's alone of a prefill.
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
NARROW = (1024, 3072)  # split: down of Qwen3-0.6B
LM_HEAD = (151936, 4096)
ROWS = (1, 16, 64, 96, 128, 160, 256, 512, 2048, 8192)
COPIES_BYTES = 256 << 20  # several times an L2 cache: in a graph of many launches too, weights come from memory


def cases(device: torch.device) -> Iterator[Case]:
    for shape in (*SHAPES, LM_HEAD):
        weights = _weights(*shape, device)
        for rows in ROWS if shape != LM_HEAD else (1, 64, 96, 160, 256):
            yield _case(torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device), weights)


def _weights(outputs: int, inputs: int, device: torch.device) -> list[torch.Tensor]:
    copies = max(2, -(-COPIES_BYTES // (2 * outputs * inputs)))
    return [torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) for _ in range(copies)]


def _case(x: torch.Tensor, weights: list[torch.Tensor]) -> Case:
    rows, (outputs, inputs) = x.shape[0], weights[0].shape
    torchs, skinnys = cycle(weights), cycle(weights)
    baselines: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, next(torchs))}
    if rows <= row_borders(x.dtype, x.device)[-1]:
        baselines["skinny_matmul"] = lambda: skinny_matmul(x, next(skinnys))
    return Case(
        op="invariant_matmul",
        shape=f"{rows} x {inputs} -> {outputs}",
        run=_launch(x, weights),
        baselines=baselines,
        bytes_moved=weights[0].nbytes + x.nbytes + rows * outputs * x.itemsize,
        flops=2 * rows * outputs * inputs,
    )


def _launch(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    ours = cycle(weights)
    return lambda: invariant_matmul(x, next(ours))


def _error(rows: int, device: torch.device) -> float:
    """The largest error of a launch at an odd shape, relative to the largest value of the float64 result; infinite if
    a row has other bits than among few others or many."""
    x = torch.randn(2048, 4104, dtype=torch.bfloat16, device=device)
    weight = torch.randn(1000, 4104, dtype=torch.bfloat16, device=device)
    y = invariant_matmul(x[: rows - 3], weight)
    for others in (1, 40, len(x)):
        if not torch.equal(invariant_matmul(x[:others], weight)[: len(y)], y[:others]):
            return float("inf")
    expected = x[: len(y)].double() @ weight.double().t()
    return float((y.double() - expected).abs().max() / expected.abs().max())


def _few(*blocks: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*block, parallel=True, tma=True) for block in blocks]


def _many(*blocks: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*block, parallel=False, tma=True) for block in blocks]


# By the most rows of x and of the weight. A block_n of 32 is another instruction on sm_90, mma.sync: it counts if its
# bits are the same.
CANDIDATES: dict[tuple[int, int], list[Tile]] = {
    (16, ANY): [*_few((64, 16, 256, 4, 5), (64, 16, 128, 4, 8), (128, 16, 128, 8, 6)), Tile(64, 16, 128, 4, 5, True)],
    (32, ANY): [*_few((64, 32, 256, 4, 4), (64, 32, 128, 4, 8), (128, 32, 128, 8, 5)), Tile(64, 32, 128, 4, 4, True)],
    (64, 8192): _few((64, 64, 128, 4, 7), (64, 64, 64, 4, 8), (128, 64, 128, 8, 4)),
    (64, ANY): _few((64, 64, 64, 4, 4), (64, 64, 128, 4, 7), (128, 64, 128, 8, 4), (32, 64, 128, 4, 4)),
    (96, 5120): _few((64, 64, 128, 4, 7), (128, 64, 64, 8, 5), (64, 32, 256, 4, 4)),
    (96, 65536): _few((128, 64, 64, 8, 5), (64, 64, 128, 4, 7), (64, 128, 64, 4, 8)),
    (128, 5120): _few((64, 64, 128, 4, 7), (64, 128, 128, 4, 4), (64, 64, 64, 4, 8)),
    (128, 8192): _few((64, 128, 64, 4, 8), (64, 128, 128, 4, 4), (128, 128, 64, 8, 7)),
    (128, ANY): _few((128, 128, 64, 8, 3), (128, 128, 64, 8, 7), (64, 128, 64, 4, 8)),
    (256, 2048): _few((64, 128, 128, 4, 4), (64, 64, 128, 4, 7), (64, 128, 64, 4, 8)),
    (256, 5120): _many((64, 128, 128, 4, 4), (64, 128, 64, 4, 8), (64, 256, 64, 4, 5)),
    (512, ANY): _many((128, 128, 64, 8, 7), (128, 256, 64, 8, 4), (64, 256, 64, 4, 5), (128, 128, 128, 8, 3)),
    (1024, 5120): _many((128, 256, 64, 8, 4), (128, 128, 64, 8, 7), (256, 128, 64, 8, 4)),
    (1024, 8192): _many((128, 128, 64, 8, 7), (128, 128, 128, 8, 3), (128, 256, 64, 8, 4)),
    (1024, ANY): _many((128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 7)),
    (ANY, ANY): [
        Tile(128, 256, 64, 8, stages, False, persistent, tma=True) for stages in (3, 4) for persistent in (False, True)
    ]
    + [Tile(128, 128, 64, 8, 3, False, tma=True), Tile(128, 128, 64, 8, 4, False, True, tma=True)],
}


def tunings(device: torch.device, shapes: Sequence[tuple[int, int]] = (*SHAPES, LM_HEAD, NARROW)) -> Iterator[Tuning]:
    """Tiles by rows of both. Candidates whose rows have other bits than the table's other tiles are printed as
    wrong."""
    weights = {shape: _weights(*shape, device) for shape in shapes}
    for bucket, tiles in CANDIDATES.items():
        most = min(bucket[0], 4096)
        fewest = max((other for other, _ in CANDIDATES if other < most), default=0) + 1
        fitting = [
            shape
            for shape in shapes
            if bucket_of(most, shape[0], CANDIDATES) == bucket and (shape != LM_HEAD or most <= 256)
        ]
        if not fitting:
            continue
        # Few rows too: a tile may be slow where it is not full.
        xs = {inputs: torch.randn(most, inputs, dtype=torch.bfloat16, device=device) for _, inputs in shapes}
        yield Tuning(
            op="invariant_matmul",
            bucket=bucket,
            table=TILES,
            tiles=tiles,
            error=partial(_error, min(most, 2048), device),
            trials={
                f"{rows} x {inputs} -> {outputs}": partial(_launch, xs[inputs][:rows], weights[outputs, inputs])
                for outputs, inputs in fitting
                for rows in (fewest, most)
            },
            in_graph=most <= 256,
        )
