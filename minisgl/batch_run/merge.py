"""`minisgl merge`: the outputs of all shards of one input become one file, in the order of the input.

Knows outputs and their manifests. Nothing is written unless every row is there.
"""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from minisgl.batch_run.journal import Journal
from minisgl.batch_run.manifest import Manifest, load_manifest, manifest_path
from minisgl.batch_run.output import check_target, journal_path
from minisgl.batch_run.tables import write_table
from minisgl.errors import MinisglError


def merge(parts: Sequence[Path], target: Path) -> int:
    """Write the rows of `parts`, the outputs of `--shard 1/N` to `N/N`, to `target`; returns their number.

    MinisglError when a shard is missing, not complete, doubled or of another command, and when `target` exists.
    """
    check_target(str(target))
    if target.exists():
        raise MinisglError(f"{target} exists; remove it or name another output with -o")
    manifests = [_manifest(part) for part in parts]
    _check_shards(parts, manifests)
    with ExitStack() as stack:
        journals = []
        for part, manifest in zip(parts, manifests, strict=True):
            path = journal_path(part, ordered=manifest.settings["ordered"])
            if not path.exists():
                raise MinisglError(f"{path} is missing: run the command of {part} again")
            journal = Journal(path, read_only=True)
            stack.callback(journal.close)
            journal.load()
            if journal.num_rows != manifest.rows:
                raise MinisglError(
                    f"{part} has {journal.num_rows:,} of {manifest.rows:,} rows: run its command again with the input"
                )
            journals.append(journal)

        def lines() -> Iterator[bytes]:
            return (data for _, data in heapq.merge(*(journal.items() for journal in journals)))

        write_table(target, lines)
        return sum(journal.num_rows for journal in journals)


def _manifest(part: Path) -> Manifest:
    manifest = load_manifest(manifest_path(part))
    if manifest is None:
        raise MinisglError(f"{part} is no output of `minisgl run`: {manifest_path(part).name} is missing")
    if not manifest.complete:
        raise MinisglError(f"{part} is not complete: run its command again, without --limit")
    return manifest


def _check_shards(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = _of_all_shards(manifests[0])
    shards: dict[int, Path] = {}
    of = manifests[0].settings["shard"][1]
    for part, manifest in zip(parts, manifests, strict=True):
        number, its_of = manifest.settings["shard"]
        changes = first.differences(_of_all_shards(manifest))
        if its_of != of:
            changes["shard"] = f"--shard was I/{of}, is I/{its_of}"
        if changes:
            raise MinisglError(f"{parts[0]} and {part} are of two commands: {'; '.join(changes.values())}")
        if manifest.input_end != manifests[0].input_end:
            raise MinisglError(
                f"{parts[0]} and {part} are of two inputs: one had {manifests[0].input_end:,} rows, the other "
                f"{manifest.input_end:,}; run both commands again with the same one"
            )
        if number in shards:
            raise MinisglError(f"{shards[number]} and {part} are both shard {number}/{of}")
        shards[number] = part
    missing = [f"{number}/{of}" for number in range(1, of + 1) if number not in shards]
    if missing:
        raise MinisglError(f"shards are missing: {', '.join(missing)}; answer them or name their outputs too")


def _of_all_shards(manifest: Manifest) -> Manifest:
    """What the shards must have in common, also where each machine keeps input and model in a folder of its own."""
    settings = {name: value for name, value in manifest.settings.items() if name not in ("shard", "model")}
    return Manifest({**settings, "inputs": [Path(name).name for name in settings["inputs"]]})
