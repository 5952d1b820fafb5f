"""Measured rows put side by side: ours, the peers' and the floor.

Of the rows in bench/results it takes the latest of each (model, workload) and of each (op, shape). Rows with engine
settings that are not the defaults are kept there, and left out here. Knows rows; does not know pages or pictures.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minisgl.bench.engines import SHAPES
from minisgl.bench.floors import floor_s
from minisgl.bench.workloads import WORKLOADS, Workload
from minisgl.models.config import ModelConfig

FOLDER = Path(__file__).resolve().parent / "results"
MEASURED = ("minisgl", "transformers")  # engines that the benches here run
FIGURES = {  # of a workload: the field of a row, and what it is called
    "mini": ("output_tokens_per_s", "output tokens/s"),
    "single": ("output_tokens_per_s", "output tokens/s"),
    "prefill": ("input_tokens_per_s", "input tokens/s"),
    "shared_prefix": ("seconds", "seconds"),
}
SEVERAL = ("model", "workload", "num_devices", "engine")  # what makes two rows of several GPUs the same
Row = dict[str, Any]


class Comparison(NamedTuple):
    """One workload of one model: the row of each engine, and the floor's figures as one more."""

    model: str
    workload: str
    rows: dict[str, Row]

    def figure(self, engine: str) -> float | None:
        """What the engine reaches, in the workload's unit; None where it was not measured."""
        value: float | None = self.rows.get(engine, {}).get(FIGURES[self.workload][0])
        return value

    def speed(self, engine: str, other: str) -> float | None:
        """How many times as fast as another engine."""
        one, two = self.figure(engine), self.figure(other)
        if one is None or two is None:
            return None
        return two / one if FIGURES[self.workload][0] == "seconds" else one / two


class Results:
    """Rows of the device that the peers were measured on, made with default settings: `ours` and `peers`.

    kernels: the latest of ours for each (op, shape). evaluations: the latest in bfloat16 of each engine, also without
    the prefix cache. several: the latest of everybody's engines on any number of GPUs. exchanges: the latest of sums
    over GPUs.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        ceilings = next(row for row in rows if row["bench"] == "ceilings")
        self.device = ceilings["device"]
        usual = [row for row in rows if row["device"] == self.device and _is_usual(row)]
        self.peers = [row for row in usual if engine_of(row) not in MEASURED]
        self.ours = [row for row in usual if engine_of(row) in MEASURED]
        limits = [ceilings, *(row["ceilings"] for row in self.ours if "ceilings" in row)]
        self.copy_gb_s = max(limit["copy_gb_s"] for limit in limits)
        self.matmul_tflops = max(limit["matmul_tflops"] for limit in limits)
        evaluations = [row for row in rows if row["device"] == self.device and row.get("dtype") == "bfloat16"]
        self.evaluations = list(latest(evaluations, "eval", "model", "rows", "context_words", "engine").values())
        several = [row for row in rows if row["device"] == self.device and _is_usual(row, "tp", "dp")]
        self.several = list(latest([row for row in several if "num_devices" in row], "throughput", *SEVERAL).values())
        self.exchanges = list(latest(rows, "all_reduce", "op", "shape").values())
        self.kernels = list(latest(self.ours, "kernels", "op", "shape").values())

    def comparisons(self) -> list[Comparison]:
        """What was measured of the workloads, in the order of the peers' rows."""
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in latest([*self.peers, *self.ours], "throughput", "model", "workload", "engine").values():
            if row["workload"] in FIGURES and (SHAPES / row["model"]).is_dir():
                found.setdefault((row["model"], row["workload"]), {})[engine_of(row)] = row
        return [Comparison(*key, {**engines, "floor": self._floor(*key)}) for key, engines in found.items()]

    def _floor(self, model: str, workload: str) -> Row:
        work = _workload(workload)
        config = ModelConfig.from_folder(SHAPES / model)
        seconds = floor_s(config, work, self.copy_gb_s, self.matmul_tflops)
        return {
            "seconds": seconds,
            "output_tokens_per_s": work.num_output_tokens / seconds,
            "input_tokens_per_s": work.num_prompt_tokens / seconds,
        }


def _is_usual(row: Row, *others: str) -> bool:
    """Bfloat16 and the default settings of the engine but for others; the first rows of kernels name no type."""
    return set(row.get("options", {})) <= {"load_format", *others} and bool(row.get("dtype", "bfloat16") == "bfloat16")


@cache
def _workload(name: str) -> Workload:
    return WORKLOADS[name](0)


def read_results() -> list[Row]:
    """All rows, in the order of the files' names and of their lines."""
    lines = (line for path in sorted(FOLDER.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines())
    return [json.loads(line) for line in lines]


def engine_of(row: Row) -> str:
    engine: str = row.get("engine", "minisgl")  # the first rows do not say
    return engine


def latest(rows: Sequence[Row], bench: str, *fields: str) -> dict[tuple[Any, ...], Row]:
    """The latest row of each key, in the order in which the keys first came."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["bench"] == bench:
            key = tuple(engine_of(row) if name == "engine" else row[name] for name in fields)
            if key not in found or row["date"] >= found[key]["date"]:
                found[key] = row
    return found
