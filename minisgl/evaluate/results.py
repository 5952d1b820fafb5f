"""Samples and results on disk: samples.jsonl, a row a line, and results.json, which says all that a number depends on.

Knows files and what every evaluation reports. Does not know how samples came about.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import minisgl
from minisgl.batch_run.answers import dump
from minisgl.batch_run.files import replaced
from minisgl.errors import MinisglError

SAMPLES, RESULTS = "samples.jsonl", "results.json"


def check_folder(folder: Path) -> None:
    """MinisglError, before anything is loaded, where results cannot be written."""
    if not folder.parent.is_dir():
        raise MinisglError(f"the folder {folder.parent} does not exist; make it first or name another with -o")
    if folder.exists() and not folder.is_dir():
        raise MinisglError(f"{folder} is a file; name a folder for the results with -o")


def save_samples(folder: Path, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass the samples on, and write them in place of those that were there when the last one is through."""
    with replaced(folder / SAMPLES) as file:
        for sample in samples:
            file.write(dump(sample))
            yield sample


def save_results(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json; returns what is in it."""
    results = {**results, "minisgl": minisgl.__version__}
    with replaced(folder / RESULTS) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
    return results


def timing(seconds: float | None, tokens: int) -> dict[str, Any]:
    """How long the model took; nothing where it was not asked."""
    if seconds is None:
        return {"seconds": None, "tokens": 0, "tokens_per_s": None}
    return {"seconds": round(seconds, 3), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
