"""bench/README.md and its plots, made from the rows in bench/results alone: `minisgl bench report`.

Knows Markdown. Which rows are shown, and the floor, are results.py's; the pictures are plots.py's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from minisgl.bench.results import FIGURES, FOLDER, MEASURED, Comparison, Results, Row, engine_of, latest, read_results
from minisgl.errors import MinisglError

BENCH = Path(__file__).resolve().parent
PAGE, PLOTS = BENCH / "README.md", BENCH / "plots"
PEERS = ("vLLM", "mini-sglang")
SAME_WORK = ("model", "workload", "num_devices")
UNITS = {"tflops": "TFLOP/s", "gb_s": "GB/s", "us": "us"}
UNIT_OF_OP = {"attention_prefill": "tflops", "attention_decode": "gb_s", "skinny_matmul": "gb_s"}

HEAD = """\
# Measured

Made by `minisgl bench report` from the rows in [results](results): measure again rather than edit. Each row there has
device, commit, versions and date. Figures are of one {device} unless they say more, in bfloat16, with random weights at
published shapes: speed does not depend on their values. To repeat them, with `--help` for the formula of each figure:

    minisgl bench throughput -m qwen3-0.6b --workload mini --json bench/results/throughput.jsonl
    minisgl bench latency -m qwen3-0.6b --batch 8 --json bench/results/latency.jsonl
    minisgl bench kernels --json bench/results/kernels.jsonl
    minisgl bench report

## Whole engine

![Speed of each engine as a share of the floor's](plots/throughput.png)

{peers} were measured on {date} on the same kind of device, with torch {torch},
on the same token ids, lengths and temperature; mini-sglang with FA3 for prefill and FlashInfer for decode. Their
figures are in [results/peers.jsonl](results/peers.jsonl). The floor is the least time the device could take, by the
formula in [floors.py](floors.py), at the best rates that were measured: {copy:,.0f} GB/s of copies and {matmul:,.0f}
TFLOP/s of bf16 matmuls. Ratios are of speed: where the figure is seconds, theirs / ours. "of 1" or "of 2"
behind the smallest and largest: of so few repeats.
"""
TRANSFORMERS = """
The same work through transformers' continuous batching (`--baseline transformers`), which anyone can repeat:
"""
LATENCY = """
## Latency

All requests of a batch are handed over at once; milliseconds.
"""
SEVERAL = """
## Several GPUs

`minisgl bench throughput` with `--tp N`, one model cut over N GPUs of a machine, and with `--dp N`, an engine on each.
"""
EXCHANGES = """
`torchrun --nproc-per-node N -m minisgl.bench.all_reduce`: microseconds of a launch inside a CUDA graph. One shot writes
all to everybody, two shots a share to each; sum_and_norm and sum_into_stream do more in the same launch.
"""
EVALUATIONS = """
## Evaluation

Multiple choice by `minisgl bench eval --baseline lm-eval`: four answers of six tokens each, behind examples that all
rows share and a question of 32 tokens. Of minisgl a run goes from the file to durable results; of the `hf` model class
of lm-evaluation-harness it is the scoring alone.
"""
SERVING = """
## Server

`minisgl bench serve`: requests over HTTP at the moments of a Poisson process; milliseconds. "of offline" is the share
of the output tokens/s of `minisgl bench throughput`.
"""
KERNELS = """
## Kernels

![Roofline](plots/roofline.png)

Pairs are medians of launches with an empty L2 cache, the host's share in it, and of launches inside a CUDA graph, as
decode runs; there, what fits stays in the cache. "of ceiling" is the first one's share of the copy rate or of the
matmul rate, measured in the same run. Columns after it have others doing the same work, run beside ours; recorded
ones are of another run, which [results/peers.jsonl](results/peers.jsonl) explains.
"""


class Page:
    """The page of some results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.comparisons = results.comparisons()

    def text(self) -> str:
        """The whole of it, in Markdown."""
        peer = next(row for row in self.results.peers if row["bench"] == "throughput")
        head = HEAD.format(
            device=self.results.device,
            peers=" and ".join(self._peer_names()),
            date=peer["date"],
            torch=peer["versions"]["torch"],
            copy=self.results.copy_gb_s,
            matmul=self.results.matmul_tflops,
        )
        sections = (
            self._throughput(),
            self._start(),
            self._transformers(),
            self._latency(),
            self._serving(),
            self._several(),
            self._exchanges(),
            self._evaluations(),
            self._kernels(),
        )
        return "\n".join([head, *(part for section in sections for part in section)])

    def _peer_names(self) -> list[str]:
        versions = {row["engine"]: row["engine_version"] for row in self.results.peers if "engine_version" in row}
        return [f"{name} {versions[name]}" for name in PEERS]

    def _throughput(self) -> Iterator[str]:
        lines = []
        for one in self.comparisons:
            row = one.rows.get("minisgl")
            to_peers = [speed for name in PEERS if (speed := one.speed("minisgl", name)) is not None]
            share = one.speed("minisgl", "floor")
            lines.append(
                [
                    *(one.model, one.workload, FIGURES[one.workload][1], _number(one.figure("minisgl"))),
                    *(_spread(one, row), *(_number(one.figure(name)) for name in (*PEERS, "floor"))),
                    *(f"{min(to_peers):.2f}x" if to_peers else "", f"{share:.0%}" if share else "", *_origin(row)),
                ]
            )
        figures = ["minisgl", "smallest .. largest", *self._peer_names(), "floor", "to the faster peer", "of the floor"]
        yield _table(["model", "workload", "figure", *figures, "commit", "date"], lines)

    def _start(self) -> Iterator[str]:
        rows = latest([*self.results.ours, *self.results.peers], "start", "model", "engine", "caches").values()
        for model in dict.fromkeys(row["model"] for row in rows):
            each = [
                f"{row['engine']} {row['ready_s']:.4g} s with {row['caches']} caches"
                for row in rows
                if row["model"] == model
            ]
            yield f"\nFrom nothing to ready with {model}: {', '.join(each)}."

    def _transformers(self) -> Iterator[str]:
        lines = []
        for one in self.comparisons:
            row, speed = one.rows.get("transformers"), one.speed("minisgl", "transformers")
            if row and speed:
                what = f"{row['engine_version']}, {row['attention']}"
                figures = [_number(one.figure(name)) for name in ("minisgl", "transformers")]
                lines.append([one.model, one.workload, FIGURES[one.workload][1], *figures, f"{speed:.1f}x", what])
        if lines:
            yield TRANSFORMERS
            yield _table(["model", "workload", "figure", *MEASURED, "as fast", "transformers, attention"], lines)

    def _latency(self) -> Iterator[str]:
        lines = []
        for row in latest(self.results.ours, "latency", "model", "batch", "input_len", "output_len", "engine").values():
            shape = [row["model"], f"{row['batch']} x {row['input_len']} in, {row['output_len']} out", engine_of(row)]
            figures = [row[f"{what}_ms"] or {} for what in ("ttft", "itl", "e2e")]
            cells = [" / ".join(f"{each[q]:.2f}" for q in ("p50", "p90", "p99") if q in each) for each in figures]
            lines.append([*shape, *cells, *_origin(row)])
        if lines:
            yield LATENCY
            columns = [f"{what} p50 / p90 / p99" for what in ("TTFT", "ITL", "E2E")]
            yield _table(["model", "requests", "engine", *columns, "commit", "date"], lines)

    def _evaluations(self) -> Iterator[str]:
        lines = []
        for row in self.results.evaluations:
            shape = f"{row['rows']:,} behind {row['context_words']:,} tokens"
            times = [_number(row["rows"] / seconds) for seconds in sorted(row["seconds_all"], reverse=True)]
            figures = [_number(row["rows_per_s"]), f"{times[0]} .. {times[-1]}"]
            lines.append([row["model"], shape, row["engine"], *figures, *_origin(row)])
        if lines:
            yield EVALUATIONS
            yield _table(["model", "rows", "engine", "rows/s", "smallest .. largest", "commit", "date"], lines)

    def _serving(self) -> Iterator[str]:
        lines = []
        for row in latest(self.results.ours, "serve", "model", "workload", "request_rate", "max_concurrency").values():
            rate = "all at once" if row["request_rate"] is None else f"{row['request_rate']:g}"
            figures = [row[f"{what}_ms"] or {} for what in ("ttft", "itl", "e2e")]
            cells = [" / ".join(f"{each[q]:.2f}" for q in ("mean", "p50", "p99") if q in each) for each in figures]
            share = row.get("share_of_offline")
            speed = [_number(row["output_tokens_per_s"]), f"{share:.1%}" if share else ""]
            together = str(row["max_concurrency"] or "")
            lines.append([row["model"], row["workload"], rate, together, *cells, *speed, *_origin(row)])
        if lines:
            yield SERVING
            columns = [f"{what} mean / p50 / p99" for what in ("TTFT", "ITL", "E2E")]
            head = ["model", "workload", "requests/s", "at most together", *columns, "output tokens/s", "of offline"]
            yield _table([*head, "commit", "date"], lines)

    def _several(self) -> Iterator[str]:
        each = [row for row in self.results.several if row["num_devices"] > 1]
        lines = []
        for row in each:
            if engine_of(row) == "minisgl":
                same = [other for other in each if all(other[name] == row[name] for name in SAME_WORK)]
                peer = next((other["output_tokens_per_s"] for other in same if engine_of(other) in PEERS), None)
                options = " ".join(
                    f"--{name} {row['options'][name]}" for name in ("tp", "dp") if name in row["options"]
                )
                speed = row["output_tokens_per_s"]
                figures = [_number(speed), _number(peer), f"{speed / peer:.2f}x" if peer else ""]
                lines.append([row["model"], row["workload"], options, *figures, *_origin(row)])
        if lines:
            yield SEVERAL
            head = ["model", "workload", "GPUs", "output tokens/s", self._peer_names()[0], "as fast", "commit", "date"]
            yield _table(head, lines)

    def _exchanges(self) -> Iterator[str]:
        by_shape: dict[str, dict[str, Row]] = {}
        for row in self.results.exchanges:
            by_shape.setdefault(row["shape"], {})[row["op"]] = row
        if by_shape:
            ops = list(dict.fromkeys(row["op"] for row in self.results.exchanges))
            yield EXCHANGES
            lines = []
            for shape, found in by_shape.items():
                row = next(iter(found.values()))
                times = [f"{found[op]['graph_us']:.1f}" if op in found else "" for op in ops]
                lines.append([shape, *times, f"{row['nccl_graph_us']:.1f}", *_origin(row)])
            yield _table(["bytes of a rank", *ops, "NCCL's sum", "commit", "date"], lines)

    def _kernels(self) -> Iterator[str]:
        if self.results.kernels:
            yield KERNELS
        for op in dict.fromkeys(row["op"] for row in self.results.kernels):
            rows = [row for row in self.results.kernels if row["op"] == op]
            unit = UNIT_OF_OP.get(op, "us")
            theirs = {(row["engine"], row["shape"]): row for row in self.results.peers if row.get("op") == op}
            peers = list(dict.fromkeys(engine for engine, shape in theirs if shape in {row["shape"] for row in rows}))
            baselines = list(dict.fromkeys(name for row in rows for name in row["baselines_us"]))
            lines = []
            for row in rows:
                in_graph = row.get("baselines_graph_us", {})
                ours = [_pair(row, "us", row["us"], row["graph_us"])]
                ours += [] if unit == "us" else [_pair(row, unit, row["us"], row["graph_us"])]
                beside = [_pair(row, unit, row["baselines_us"].get(name), in_graph.get(name)) for name in baselines]
                once = [_once(theirs.get((name, row["shape"]), {}), unit) for name in peers]
                lines.append([row["shape"], *ours, f"{row['share']:.0%}", *beside, *once, *_origin(row)])
            yield f"### {op}, {UNITS[unit]}\n"
            recorded = [f"{name}, recorded" for name in peers]
            ours_columns = ["us"] if unit == "us" else ["us", f"minisgl, {UNITS[unit]}"]
            yield _table(["shape", *ours_columns, "of ceiling", *baselines, *recorded, "commit", "date"], lines)


def write_report() -> list[Path]:
    """Write the page and the plots; returns their paths. MinisglError outside a checkout and without matplotlib."""
    if not (FOLDER / "peers.jsonl").is_file():
        raise MinisglError(f"there are no rows in {FOLDER}: bench report needs a checkout")
    from minisgl.bench import plots

    page = Page(Results(read_results()))
    throughput, roofline = PLOTS / "throughput.png", PLOTS / "roofline.png"
    plots.shares(page.comparisons, PEERS, page.results.device, throughput)
    plots.roofline(page.results.kernels, roofline)
    PAGE.write_text(page.text(), encoding="utf-8")
    return [PAGE, throughput, roofline]


def _number(value: float | None) -> str:
    """Thousands in groups; 3 digits at least."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _pair(row: Row, unit: str, us: float | None, graph_us: float | None) -> str:
    """What a launch of a row's work reaches in these times: with an empty cache / in a graph."""
    work = {"us": 0.0, "gb_s": row["gb_s"] * row["us"], "tflops": (row["tflops"] or 0.0) * row["us"]}[unit]
    return " / ".join(_number(work / one if work else one) for one in (us, graph_us) if one is not None)


def _once(row: Row, unit: str) -> str:
    """A peer's figure; it names its unit where that is another one."""
    return next((_number(row[name]) + ("" if name == unit else f" {UNITS[name]}") for name in UNITS if name in row), "")


def _spread(one: Comparison, row: Row | None) -> str:
    """The worst and the best of the repeats, in the workload's unit."""
    figure = one.figure("minisgl")
    if row is None or figure is None:
        return ""
    in_seconds = FIGURES[one.workload][0] == "seconds"
    each = sorted(one_s if in_seconds else figure * row["seconds"] / one_s for one_s in row["seconds_all"])
    few = f" of {len(each)}" if len(each) < 3 else ""
    return f"{_number(each[0])} .. {_number(each[-1])}{few}"


def _origin(row: Row | None) -> tuple[str, str]:
    return (str(row["commit"]), row["date"][:10]) if row else ("", "")


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
