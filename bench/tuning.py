"""Find the best tile of each shape bucket on this GPU: `minisgl bench kernels OP... --tune FILE`.

A kernel that can be tuned has a tile table `TILES[architecture][bucket]`; its file here has
`tunings(device) -> Iterator[Tuning]`. A tile counts when its result agrees with the reference and it fits the GPU; the
best has the smallest geometric mean of time over the bucket's shapes. Nothing is changed but FILE: the kernel's table
gets the printed line.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minisgl.bench.harness import graph_time_us, time_us
from minisgl.bench.kernels import available_ops, bench_module, choose_ops, open_gpu
from minisgl.errors import MinisglError
from minisgl.kernels.launch import architecture

TOLERANCE = 1e-2  # bf16 rounds inputs of a sum to 4e-3 and its result once more; what is wrong is wrong by far more


@dataclass(frozen=True)
class Tuning:
    """One bucket of an op's tile table."""

    op: str
    bucket: Any  # a key of the table
    table: dict[str, dict[Any, Any]]  # the kernel's own: the tile under trial is put there
    tiles: Sequence[Any]  # candidates
    error: Callable[[], float]  # of a launch at odd shapes with the table's tile, relative to the largest value
    trials: dict[str, Callable[[], Callable[[], object]]]  # shape: makes the launch to time, with the table's tile
    in_graph: bool  # whether the engine runs the op inside a CUDA graph


def tune(ops: list[str], device: str | torch.device, path: Path) -> None:
    """Tune the named ops, or all that can be; print the tables and merge them into the JSON file `path`.

    The file has {architecture: {op: {bucket: {field of the tile: value}}}}. Raises MinisglError without a GPU, for an
    op that cannot be tuned here, and for a `path` that holds something else.
    """
    tunable = [op for op in available_ops() if hasattr(bench_module(op), "tunings")]
    for op in ops:
        if op not in tunable:
            raise MinisglError(f"no tiles to tune for the op {op!r}: known are {', '.join(tunable)}")
    device = open_gpu(device, "--tune")
    ops = choose_ops(ops, tunable, device)
    tables = _read(path)
    _write(path, tables)  # a path that cannot be written should fail now
    name = architecture(device)
    for op in ops:
        best = {}
        for tuning in bench_module(op).tunings(device):
            tile = best_tile(tuning, name)
            if tile is None:
                raise MinisglError(f"no candidate tile of {op} for {tuning.bucket} works on {name}")
            best[tuning.bucket] = tile
            tables.setdefault(name, {}).setdefault(op, {})[str(tuning.bucket)] = tile._asdict()
            _write(path, tables)  # what was found survives Ctrl-C
        entries = ", ".join(f"{bucket}: Tile({', '.join(map(str, tile))})" for bucket, tile in best.items())
        print(f'{op}, for kernels/{op}.py:\n    "{name}": {{{entries}}},\n', flush=True)
    print(path)


def best_tile(tuning: Tuning, architecture: str) -> Any:
    """The fastest right tile of a bucket, each printed with its figures; None when none works."""
    timer = graph_time_us if tuning.in_graph else time_us
    print(f"{tuning.op}, {tuning.bucket}: us at {'; '.join(tuning.trials)}")
    best, best_us = None, float("inf")
    for tile in tuning.tiles:
        text = f"  {', '.join(f'{name} {value}' for name, value in tile._asdict().items())}:"
        try:
            with using(tuning.table, architecture, tuning.bucket, tile):
                error = tuning.error()
                if not error <= TOLERANCE:  # NaN too
                    print(f"{text} wrong, relative error {error:.1e}", flush=True)
                    continue
                times = [timer(make()) for make in tuning.trials.values()]
        except Exception as failure:  # too much shared memory, or whatever else a compiler says
            print(f"{text} does not run: {(str(failure).splitlines() or [type(failure).__name__])[0]}", flush=True)
            continue
        mean_us = statistics.geometric_mean(times)
        print(f"{text} {' '.join(f'{us:.1f}' for us in times)}, mean {mean_us:.1f}", flush=True)
        if mean_us < best_us:
            best, best_us = tile, mean_us
    return best


@contextmanager
def using(table: dict[str, dict[Any, Any]], architecture: str, bucket: Any, tile: Any) -> Iterator[None]:
    """Have a kernel's table name this tile meanwhile."""
    before = table.get(architecture)
    table[architecture] = {**(before or {}), bucket: tile}
    try:
        yield
    finally:
        if before is None:
            del table[architecture]
        else:
            table[architecture] = before


def _write(path: Path, tables: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MinisglError(f"{path} is no JSON tile table ({error}): name another file") from error
    if not isinstance(tables, dict) or not all(isinstance(ops, dict) for ops in tables.values()):
        raise MinisglError(f"{path} is no tile table of --tune: name another file")
    return tables
