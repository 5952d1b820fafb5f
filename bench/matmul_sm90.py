"""The matmuls of large decode batches on Hopper at shapes of Qwen3-0.6B to 14B, bf16, each launch with another copy of
the weight, beside torch's; a gated one beside torch's and the gate."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F

from minisgl.bench.harness import Case
from minisgl.bench.tuning import Tuning
from minisgl.kernels.matmul_sm90 import (
    GATED,
    PARTS,
    TILES,
    WHOLE,
    Tile,
    find_tile,
    matmul_sm90,
    matmul_sm90_reference,
    row_borders,
)
from minisgl.kernels.silu_mul import silu_mul

ARCHITECTURES = ("sm_90",)
# Kind, N, K of qkv, o, gate and up, down of 0.6B and 8B; then of others that have tiles of their own.
SHAPES = (
    (WHOLE, 4096, 1024),
    (PARTS, 1024, 2048),
    (GATED, 3072, 1024),
    (PARTS, 1024, 3072),
    (WHOLE, 6144, 4096),
    (PARTS, 4096, 4096),
    (GATED, 12288, 4096),
    (PARTS, 4096, 12288),
    (WHOLE, 7168, 5120),
    (GATED, 6144, 2048),
    (PARTS, 2048, 6144),
    (GATED, 9728, 2560),
    (GATED, 17408, 5120),
    (PARTS, 5120, 17408),
    (GATED, 18944, 3584),
)
ROWS = (32, 64, 128, 192, 256)
COPIES_BYTES = 256 << 20  # several times an L2 cache: in a graph of many launches too, weights come from memory
# By consumer groups and rows of each; those that hold a bucket's rows in up to four tiles are tried.
BLOCKS = {
    (1, 64): (
        *((32, 0, 8), (32, 16, 12), (64, 0, 8), (64, 0, 10), (64, 16, 10), (64, 32, 8), (64, 32, 9), (128, 0, 8)),
        *((128, 16, 7), (128, 32, 7), (128, 64, 4), (128, 64, 5), (256, 16, 5)),
    ),
    (2, 64): (
        *((64, 0, 8), (64, 16, 8), (64, 32, 7), (128, 0, 6), (128, 32, 6)),
        *((128, 64, 5), (256, 0, 4), (256, 16, 4)),
    ),
    (3, 64): ((64, 0, 6), (128, 0, 5), (128, 16, 5), (128, 32, 5), (128, 64, 4)),
    (2, 128): ((128, 0, 4), (128, 64, 4)),
}


def cases(device: torch.device) -> Iterator[Case]:
    for kind, outputs, inputs in SHAPES:
        weights = weight_copies(kind, outputs, inputs, device)
        for rows in ROWS:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
            if find_tile(x, weights[0], kind) is not None:
                yield _case(x, weights, kind)


def weight_copies(kind: str, outputs: int, inputs: int, device: torch.device) -> list[torch.Tensor]:
    """As many as do not fit in an L2 cache."""
    outputs *= 1 + (kind == GATED)
    copies = max(2, -(-COPIES_BYTES // (2 * outputs * inputs)))
    return [torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) for _ in range(copies)]


def _case(x: torch.Tensor, weights: list[torch.Tensor], kind: str) -> Case:
    rows, (outputs, inputs) = x.shape[0], weights[0].shape
    torchs = cycle(weights)

    def baseline() -> torch.Tensor:
        y = F.linear(x, next(torchs))
        return silu_mul(y) if kind == GATED else y

    return Case(
        op="matmul_sm90",
        shape=f"{rows} x {inputs} -> {outputs}, {kind}",
        run=_launch(x, weights, kind),
        baselines={"torch": baseline},
        bytes_moved=weights[0].nbytes + x.nbytes + rows * outputs * x.itemsize // (1 + (kind == GATED)),
        flops=2 * rows * outputs * inputs,
    )


def _launch(x: torch.Tensor, weights: list[torch.Tensor], kind: str) -> Callable[[], torch.Tensor]:
    ours, tile = cycle(weights), find_tile(x, weights[0], kind)
    assert tile is not None
    return lambda: matmul_sm90(x, next(ours), None, tile, kind)


def _error(bucket: tuple[str, int, int], device: torch.device) -> float:
    """The largest error of a launch at an odd shape, relative to the largest value of the float64 result."""
    kind, rows, _ = bucket
    x = torch.randn(rows, 1000, dtype=torch.bfloat16, device=device)
    weight = torch.randn(656, 1000, dtype=torch.bfloat16, device=device) / 32
    y = matmul_sm90(x, weight, None, TILES["sm_90"][bucket], kind)
    expected = matmul_sm90_reference(x.double(), weight.double(), None, kind)
    return float(((y.sum(0) if y.dim() == 3 else y).double() - expected).abs().max() / expected.abs().max())


def tunings(device: torch.device) -> Iterator[Tuning]:
    tiles = TILES["sm_90"]
    for bucket in list(tiles):
        kind, rows, most_outputs = bucket
        fewest = max(border for border in row_borders() if border < rows) + 1
        x = torch.randn(rows, 12288, dtype=torch.bfloat16, device=device)
        trials: dict[str, Callable[[], Callable[[], object]]] = {}
        for shape_kind, outputs, inputs in SHAPES:
            if shape_kind != kind or outputs > most_outputs:
                continue
            weights = weight_copies(kind, outputs, inputs, device)
            if find_tile(x[:, :inputs], weights[0], kind) is not tiles[bucket]:
                continue  # one of fewer outputs
            for some in {fewest, rows}:
                trials[f"{some} x {inputs} -> {outputs}"] = partial(_launch, x[:some, :inputs], weights, kind)
        candidates = [
            Tile(groups, group_rows, *block)
            for (groups, group_rows), blocks in BLOCKS.items()
            if groups * group_rows < rows + 64 and 4 * groups * group_rows >= rows
            for block in blocks
        ]
        if trials:
            yield Tuning(
                op="matmul_sm90",
                bucket=bucket,
                table=TILES,
                tiles=candidates,
                error=partial(_error, bucket, device),
                trials=trials,
                in_graph=True,
            )
