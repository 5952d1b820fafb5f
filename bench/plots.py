"""Pictures of rows, through matplotlib (extra `bench`). Knows rows; measures nothing."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisgl.bench.results import FIGURES, Comparison
from minisgl.errors import MinisglError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise MinisglError("plots need matplotlib: pip install 'minisgl[bench]', or pip install matplotlib") from error

COLOURS = ("#0b6e4f", "#e07a1f", "#8d99ae", "#5b4b8a", "#c1292e", "#3a86c8", "#b08900", "#6b705c")
GREY = "#5c6370"
Row = dict[str, Any]


def roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw rows of `bench kernels` of one device: TFLOP/s over FLOP/byte under what the device was measured to reach,
    and beside it GB/s of the copy rate for ops that only move bytes. The format follows the path's suffix."""
    limits = rows[-1]["ceilings"]
    copy_tb_s, matmul = limits["copy_gb_s"] / 1e3, limits["matmul_tflops"]
    figure, (left, right) = _figure(12, 4.6, [2, 1])
    computing: dict[str, list[Row]] = defaultdict(list)
    moving: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        (computing if row["tflops"] else moving)[row["op"]].append(row)

    intensities = [row["tflops"] * 1e3 / row["gb_s"] for of_op in computing.values() for row in of_op]
    ridge = matmul / copy_tb_s
    low, high = min([0.5, *intensities]) / 1.5, max([4 * ridge, *intensities]) * 1.5
    left.plot([low, ridge, high], [low * copy_tb_s, matmul, matmul], color=GREY, linewidth=1.5)
    left.annotate(f"copy {copy_tb_s:.2f} TB/s", (low * 4, low * 4 * copy_tb_s / 2), color=GREY, fontsize=9)
    left.annotate(f"bf16 matmul {matmul:.0f} TFLOP/s", (ridge * 1.1, matmul * 1.12), color=GREY, fontsize=9)
    for colour, (op, of_op) in zip(COLOURS, computing.items(), strict=False):
        points = [(row["tflops"] * 1e3 / row["gb_s"], row["tflops"]) for row in of_op]
        left.scatter(*zip(*points, strict=True), s=28, color=colour, label=op, zorder=3)
    left.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP / byte", ylabel="TFLOP/s")
    left.set_ylim(top=matmul * 1.6)
    left.set_title(f"{rows[-1]['device']}: ops with matmuls", fontsize=11)
    if computing:
        left.legend(frameon=False, loc="lower right", fontsize=9)

    for place, of_op in enumerate(moving.values()):
        shares = [100 * row["gb_s"] / limits["copy_gb_s"] for row in of_op]
        right.scatter(shares, [place] * len(shares), s=28, color=COLOURS[0], alpha=0.6, zorder=3)
    right.axvline(100, color=GREY, linewidth=1.5)
    right.set_yticks(range(len(moving)), list(moving))
    right.set(xlim=(0, 125), ylim=(max(len(moving), 1) - 0.5, -0.5), xlabel="% of the copy rate; a point is a shape")
    right.set_title("ops that move bytes", fontsize=11)
    _save(figure, path)


def shares(comparisons: Sequence[Comparison], peers: Sequence[str], device: str, path: Path) -> None:
    """Draw each engine's speed as a share of the floor's: a panel a model, a group of bars a workload."""
    panels: dict[str, list[Comparison]] = defaultdict(list)
    for one in comparisons:
        panels[one.model].append(one)
    figure, axes = _figure(11, 3.9, [len(group) + 0.6 for group in panels.values()])
    engines = (*peers, "minisgl")
    colours = dict(zip(engines, (COLOURS[2], COLOURS[5], COLOURS[0]), strict=True))
    for axis, (model, group) in zip(axes, panels.items(), strict=True):
        for place, engine in enumerate(engines):
            speeds = [one.speed(engine, "floor") for one in group]
            bars = [(index, 100 * speed) for index, speed in enumerate(speeds) if speed is not None]
            x = [index + (place - 1) * 0.27 for index, _ in bars]
            axis.bar(x, [share for _, share in bars], 0.25, color=colours[engine], label=engine)
            for left, (index, share) in zip(x, bars, strict=True):
                bold = "bold" if engine == "minisgl" else "normal"
                text = _short(group[index].figure(engine))
                axis.text(left, share + 1.5, text, ha="center", va="bottom", fontsize=7.5, rotation=90, weight=bold)
        axis.axhline(100, color=GREY, linewidth=1)
        axis.set_xticks(range(len(group)), [f"{one.workload}\n{FIGURES[one.workload][1]}" for one in group], fontsize=8)
        axis.set(xlim=(-0.6, len(group) - 0.4), ylim=(0, 112), title=model)
        axis.grid(False, axis="x")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    axes[0].set_ylabel(f"% of what one {device} allows")
    axes[0].legend(frameon=False, loc="upper center", fontsize=8.5, ncols=3, bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def serving(rows: Sequence[Row], path: Path) -> None:
    """Draw rows of `bench serve`, a point a row: latencies and tokens per second over the requests per second that were
    answered."""
    rows = sorted(rows, key=lambda row: float(row["requests_per_s"]))
    figure, (left, middle, right) = _figure(12, 3.9, [1, 1, 1])
    x = [row["requests_per_s"] for row in rows]
    for axis, metric, what in ((left, "ttft_ms", "TTFT"), (middle, "itl_ms", "ITL")):
        for colour, figure_of in zip(COLOURS, ("p50", "p99"), strict=False):
            y = [(row[metric] or {}).get(figure_of) for row in rows]
            axis.plot(x, y, color=colour, marker="o", markersize=4, label="median" if figure_of == "p50" else figure_of)
        axis.set(title=f"{what}, ms", xlabel="requests/s answered", ylim=(0, None), xlim=(0, None))
        axis.legend(frameon=False, fontsize=9)
    right.plot(x, [row["output_tokens_per_s"] for row in rows], color=COLOURS[0], marker="o", markersize=4)
    right.set(title="output tokens/s", xlabel="requests/s answered", ylim=(0, None), xlim=(0, None))
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['workload']}, {rows[0]['device']}", fontsize=11)
    _save(figure, path)


def _short(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _figure(width: float, height: float, columns: Sequence[float]) -> tuple[Any, Any]:
    """A figure with axes side by side, of these relative widths; no global state, no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(columns), squeeze=False, width_ratios=columns)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e3e6ea", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110, facecolor="white")
    except ValueError as error:  # a suffix that matplotlib does not know
        raise MinisglError(f"{path} cannot be drawn: {error}") from error
