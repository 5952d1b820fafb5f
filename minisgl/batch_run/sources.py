"""Inputs: what was named on the command line becomes a list of sources, and their rows a stream of records.

    FILE.jsonl .json .csv .parquet .txt [.gz .zst]    a folder or a glob of them    hf:ORG/NAME[:CONFIG]
    a folder that `datasets` saved                    - (JSON lines from stdin)

Knows names and formats (formats.py and data_sets.py read them). Does not know what a row says. An index counts rows
over all sources.
"""

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from minisgl.batch_run import data_sets, formats
from minisgl.batch_run.files import is_stream
from minisgl.batch_run.manifest import MANIFEST_SUFFIX, manifest_path
from minisgl.batch_run.output import JOURNAL_SUFFIX, own_files
from minisgl.batch_run.rows import Record, Value
from minisgl.errors import MinisglError

HUB = "hf:"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
MAX_COUNTED_BYTES = 4 << 30  # counting the rows of a larger file, only for an ETA, takes too long


@dataclass(frozen=True)
class Source:
    """One input. `read` gives rows with their index in it, from 0, and raises MinisglError; `count` gives their
    number where that is cheap. unit: what a row of it is called in messages."""

    name: str
    unit: str
    read: Callable[[], Iterator[tuple[int, Value]]]
    count: Callable[[], int | None] = lambda: None
    path: Path | None = None


def open_sources(inputs: Sequence[str], split: str | None = None, output: str = "-") -> list[Source]:
    """The sources that the inputs name, in a fixed order. MinisglError when there is none or one cannot be read.

    Results, manifests and journals that a folder or a glob holds are no inputs; `output` and the files beside it must
    not be one.
    """
    if list(inputs).count("-") > 1:
        raise MinisglError("- is named twice, and stdin can be read once: leave one out")
    sources = [source for name in inputs for source in _expand(name, split, output)]
    if split is not None and all(source.path for source in sources):
        raise MinisglError("--split is for data sets (hf:ORG/NAME, or a folder that `datasets` saved): leave it out")
    for source in sources:
        if source.path and any(_is_same_file(source.path, path) for path in own_files(output)):
            raise MinisglError("the output is the input file, which would be lost; name another output with -o")
    return sources


def read_records(
    sources: Sequence[Source],
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    on_end: Callable[[int], None] = lambda end: None,
) -> Iterator[Record]:
    """The rows of all sources, as they are asked for: of `shard` (i, n) every n-th from the i-th on, then the first
    `limit` of these (None: all). `on_end` is told the index after the last one of all, when that was read."""
    return islice(_read(sources, shard, on_end), limit)


def _read(sources: Sequence[Source], shard: tuple[int, int], on_end: Callable[[int], None]) -> Iterator[Record]:
    number, of = shard
    base = 0
    for source in sources:
        place = source.unit if len(sources) == 1 else f"{source.name}, {source.unit}"
        index = base - 1
        for local, value in source.read():
            index = base + local
            if index % of == number - 1:
                yield Record(index, f"{place} {local + 1}", value)
        base = index + 1
    on_end(base)


def count_rows(sources: Sequence[Source], shard: tuple[int, int] = (1, 1), limit: int | None = None) -> int | None:
    """About how many rows `read_records` will give, for a progress bar; None when that cannot be known cheaply."""
    total = 0
    for source in sources:
        count = source.count()
        if count is None:
            return None
        total += count
    total = (total + shard[1] - shard[0]) // shard[1]
    return total if limit is None else min(total, limit)


def default_output(inputs: Sequence[str], shard: tuple[int, int] = (1, 1)) -> str:
    """prompts.jsonl -> prompts.results.jsonl beside it; stdin -> stdout; a data set -> its name, in this folder."""
    if len(inputs) > 1 or glob.has_magic(inputs[0]) and not Path(inputs[0]).exists():
        raise MinisglError("name the output with -o when there are several inputs")
    name = inputs[0]
    if name == "-":
        return "-"
    if name.startswith(HUB):
        path = Path(name.removeprefix(HUB).replace(":", "-").rpartition("/")[2])
    else:
        path = Path(name)
        if is_stream(path):
            raise MinisglError(f"name the output with -o: {name} is a pipe or a device, which has no place beside it")
        for suffix in (*formats.COMPRESSIONS, *SUFFIXES):
            path = path.with_name(path.name.removesuffix(suffix) or path.name) if path.name else path.resolve()
    part = f".{shard[0]}-of-{shard[1]}" if shard[1] > 1 else ""
    return str(path.with_name(path.name + part + ".results.jsonl"))


def _expand(name: str, split: str | None, output: str) -> list[Source]:
    if name == "-":
        return [Source("stdin", "line", lambda: formats.read_lines(_stdin()), path=Path("/dev/stdin"))]
    if name == HUB:
        raise MinisglError("hf: names no data set; name it as hf:ORG/NAME or hf:ORG/NAME:CONFIG")
    if name.startswith(HUB):
        return [_data_set(name, split, lambda: data_sets.load_hub(name.removeprefix(HUB), split))]
    path = Path(name)
    if path.is_dir():
        if any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            return [_data_set(name, split, lambda: data_sets.load_saved(path, split))]
        found = [file for file in sorted(path.rglob("*")) if _format(file) is not None]
        return _files(found, f"{name} has no file to read (of {', '.join(SUFFIXES)})", output)
    if not path.exists() and glob.has_magic(name):
        found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if not Path(match).is_dir()]
        return _files(found, f"no file matches {name}; check the pattern", output)
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise MinisglError(f"{name} does not exist; check the path, or give - to read stdin") from None
    except OSError as error:
        raise MinisglError(f"{name} cannot be read: {error.strerror}") from error
    return [_file(path)]


def _files(found: list[Path], none: str, output: str) -> list[Source]:
    """Sources of the files that are not this tool's own."""
    own = (MANIFEST_SUFFIX, JOURNAL_SUFFIX, ".results.jsonl")
    inputs = [
        path
        for path in found
        if not path.name.endswith(own) and not manifest_path(path).exists() and path.resolve() != Path(output).resolve()
    ]
    if not inputs:
        raise MinisglError(none)
    return [_file(path) for path in inputs]


def _format(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of its compression; None when it has another."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in formats.COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _file(path: Path) -> Source:
    """A file by its suffix; without a known one it is read as JSON lines."""
    readers = {
        ".csv": ("row", formats.read_csv),
        ".txt": ("line", formats.read_text),
        ".json": ("row", formats.read_json),
        ".parquet": ("row", formats.read_parquet),
    }
    unit, reader = readers.get(_format(path) or "", ("line", formats.read_lines))

    def read() -> Iterator[tuple[int, Value]]:
        try:
            with formats.open_compressed(path) as file:
                yield from reader(file)
        except MinisglError as error:
            raise MinisglError(f"{path}: {error}") from error
        except (OSError, EOFError) as error:
            raise MinisglError(f"{path} cannot be read to its end: {error}") from error

    def count() -> int | None:
        if _format(path) == ".parquet" and path.suffix == ".parquet":
            return formats.count_parquet(path)
        if unit == "row" or not path.is_file() or path.suffix in formats.COMPRESSIONS:
            return None
        if path.stat().st_size > MAX_COUNTED_BYTES:
            return None
        with path.open("rb") as file:
            return sum(1 for _ in formats.read_lines(file))

    return Source(path.name, unit, read, count, path)


def _data_set(name: str, split: str | None, load: Callable[[], Any]) -> Source:
    """A data set that is loaded once, when its rows or their number are first asked for."""
    loaded: list[Any] = []

    def data() -> Any:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    return Source(name, "row", lambda: data_sets.read_data_set(data()), lambda: data_sets.count_data_set(data(), split))


def _is_same_file(source: Path, output: Path) -> bool:
    """Whether both are one file, by any name. Terminals and pipes never are."""
    try:
        return source.is_file() and source.samefile(output)
    except OSError:  # no such output yet, or a stream that is closed
        return False


def _stdin() -> BinaryIO:
    """Stdin, by a file object of its own: a thread that still waits in it must not hold the lock of Python's."""
    if sys.stdin is None:
        raise MinisglError("stdin is closed; name a file of JSON lines")
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # replaced by something that is no file
        return sys.stdin.buffer
