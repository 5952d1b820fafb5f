"""How a server answers under load: `minisgl bench serve`.

Requests are sent at the moments of a Poisson process, whether or not earlier ones have been answered (open loop), all
at once, or as earlier ones end (closed loop). A token's time is when the client has it. The command's help has the
formula of each figure.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from minisgl.bench.harness import environment, write_rows
from minisgl.bench.http_client import Server, Timing
from minisgl.bench.workloads import MAX_ID, load, name_of
from minisgl.errors import MinisglError

METRICS = ("ttft", "itl", "tpot", "e2e")
LOCAL = ("127.0.0.1", "localhost", "::1")
Row = dict[str, Any]


def run(
    url: str,
    workload: str,
    *,
    request_rates: Sequence[float] = (float("inf"),),
    max_concurrency: int | None = None,
    goodput: Mapping[str, float] | None = None,
    seed: int = 0,
    warmups: int = 1,
    offline_path: Path | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> Iterator[Row]:
    """A row for each of `request_rates` (requests per second; infinity: all at once), as soon as it is measured, and by
    then also in `json_path`.

    `warmups`: untimed runs of all requests at once, before the first rate, so that what a server does once (it captures
    each size of a batch) is not taken for its speed. `goodput`: the most milliseconds of metrics. `offline_path`: rows
    of `bench throughput`, of which the latest of the same workload, model and type gives `share_of_offline`.
    MinisglError when there is no server, no such row, or no request of a run is answered.
    """
    server = Server(url)
    work = load(workload, server, server.info.get("vocab_size", MAX_ID + 1))
    about: Row = {"engine": server.engine, "model": server.model, "workload": name_of(workload)}
    about |= {"dtype": server.info.get("dtype"), "max_concurrency": max_concurrency}
    offline = _offline(offline_path, server, about) if offline_path else None
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    if plot_path:
        from minisgl.bench import plots  # what is missing should be missing now
    for _ in range(warmups):
        asyncio.run(server.run(work, [0.0] * len(work.prompts), max_concurrency))
    rows = []
    for rate in request_rates:
        flushed = server.flush_cache()
        due_s = arrivals(len(work.prompts), rate, seed)
        timings = asyncio.run(server.run(work, due_s, max_concurrency))
        figures = summary(timings, goodput or {})
        if offline:
            share = figures["output_tokens_per_s"] / offline["output_tokens_per_s"]
            figures["share_of_offline"] = round(share, 4)
        rate_or_none = None if np.isinf(rate) else rate
        row = {"bench": "serve", **about, "request_rate": rate_or_none, "cache_flushed": flushed, **figures}
        rows.append(row | _environment(server))
        if json_path:
            write_rows(json_path, rows[-1:])
        yield rows[-1]
    if plot_path:
        plots.serving(rows, plot_path)


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Moments in seconds of a Poisson process, from 0 on; the same for the same seed, and stretched by 1 / rate."""
    gaps = np.random.default_rng(seed).exponential(1.0, count)
    gaps[:1] = 0
    moments: list[float] = (gaps.cumsum() / rate).tolist()
    return moments


def summary(timings: Sequence[Timing], goodput: Mapping[str, float]) -> Row:
    """The figures of a run. MinisglError, with the first error, when nothing was answered."""
    good = [timing for timing in timings if not timing.error]
    errors = [timing.error for timing in timings if timing.error]
    if not good:
        raise MinisglError(f"no request was answered; the first error: {errors[0]}")
    seconds = max(timing.end_s for timing in good)
    values = [metrics(timing) for timing in good]
    each = {name: _figures([value for found in values for value in found[name]]) for name in METRICS}
    kept = sum(all(np.mean(found[name] or 0) <= limit for name, limit in goodput.items()) for found in values)
    output_tokens = sum(len(timing.tokens_s) for timing in good)
    prompt_tokens = sum(timing.prompt_tokens for timing in good)
    return {
        "requests": len(timings),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": round(seconds, 4),
        "requests_per_s": round(len(good) / seconds, 3),
        "output_tokens_per_s": round(output_tokens / seconds, 1),
        "input_tokens_per_s": round(prompt_tokens / seconds, 1),
        **{f"{name}_ms": figures for name, figures in each.items()},
        "goodput": {"limits_ms": dict(goodput), "share": round(kept / len(timings), 4)} if goodput else None,
        "late_ms": _figures([1e3 * (timing.sent_s - timing.due_s) for timing in good]),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": sum(timing.cached_tokens for timing in good),
    }


def metrics(timing: Timing) -> dict[str, list[float]]:
    """The samples of one request, in ms; none of what it has not."""
    tokens_s = timing.tokens_s or [timing.end_s]
    more = len(tokens_s) - 1
    return {
        "ttft": [1e3 * (tokens_s[0] - timing.sent_s)],
        "itl": [1e3 * (after - before) for before, after in pairwise(tokens_s)],
        "tpot": [1e3 * (tokens_s[-1] - tokens_s[0]) / more] if more else [],
        "e2e": [1e3 * (timing.end_s - timing.sent_s)],
    }


def _figures(samples: Sequence[float]) -> dict[str, float] | None:
    """None where there are no samples: answers of one token have no gaps."""
    if not samples:
        return None
    found = {"mean": np.mean(samples), "p50": np.percentile(samples, 50), "p99": np.percentile(samples, 99)}
    return {name: round(float(value), 3) for name, value in found.items()}


def _environment(server: Server) -> Row:
    """Of this machine when the server is here; of another one only what it says of itself."""
    host = urlsplit(server.url).hostname or ""
    device = str(server.info.get("device", "unknown"))
    if host in LOCAL:
        return environment(torch.device("cuda" if device.startswith("cuda") else "cpu"))
    return environment(torch.device("cpu")) | {"device": f"{device} of {host}", "architecture": None, "commit": None}


def _offline(path: Path, server: Server, about: Row) -> Row:
    """The row to compare with."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found = [row for row in rows if row["bench"] == "throughput" and row["engine"] == about["engine"]]
        found = [row for row in found if all(row[name] == about[name] for name in ("workload", "dtype"))]
        found = [
            row for row in found if Path(row["model"]).name in (server.model, Path(server.info["model_path"]).name)
        ]
        return max(found, key=lambda row: str(row["date"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MinisglError(
            f"{path} has no row of {about['model']} and {about['workload']}: run `minisgl bench throughput --workload "
            f"{about['workload']} --json {path}` first"
        ) from error


def table(row: Row) -> str:
    """A row as text."""
    rate = "all at once" if row["request_rate"] is None else f"{row['request_rate']:g} requests/s"
    most = f", at most {row['max_concurrency']} together" if row["max_concurrency"] else ""
    lines = [f"{row['engine']}, {row['model']}, {row['workload']}, {rate}{most}, {row['dtype']}, {row['device']}"]
    for name in METRICS:
        if figures := row[f"{name}_ms"]:
            each = "  ".join(f"{what} {value:.2f}" for what, value in figures.items())
            lines.append(f"  {name.upper():<15} ms  {each}")
    lines.append(f"  {'requests/s':<16}  {row['requests_per_s']:.2f}  ({row['requests']} in {row['seconds']:.2f} s)")
    share = row.get("share_of_offline")
    of_offline = "" if share is None else f"  ({share:.1%} of offline)"
    lines.append(f"  {'output tokens/s':<16}  {row['output_tokens_per_s']:,.1f}{of_offline}")
    lines.append(f"  {'input tokens/s':<16}  {row['input_tokens_per_s']:,.1f}")
    if goodput := row["goodput"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["limits_ms"].items())
        lines.append(f"  {'goodput':<16}  {goodput['share']:.1%} within {limits}")
    if row["max_concurrency"] is None:
        lines.append(f"  {'late':<16}  p99 {row['late_ms']['p99']:.2f} ms behind the moment they were due")
    if row["failed"]:
        lines.append(f"  {'failed':<16}  {row['failed']}, the first: {row['first_error']}")
    if not row["cache_flushed"]:
        lines.append("  the server's prefix cache could not be emptied first")
    return "\n".join(lines)
