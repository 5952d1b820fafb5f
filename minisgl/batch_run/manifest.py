"""OUT.manifest.json: with what the rows of an output were asked, so that only the same command goes on with it.

Knows a dictionary of settings. Does not know rows.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minisgl
from minisgl.batch_run.files import replaced
from minisgl.errors import MinisglError

FORMAT = 1
MANIFEST_SUFFIX = ".manifest.json"
# Engine settings that change how fast an answer comes and not which one; any other one makes it another command. The
# dtype is recorded as it was resolved: "auto" is another one on another device.
UNRECORDED = (
    *("dtype", "device", "max_running", "max_step_tokens", "page_size", "max_graph_batch", "overlap", "num_pages"),
    *("memory_fraction", "cache", "cascade", "evict", "tp", "dp", "watchdog_s"),
)
# Of a larger file, one of weights, so many samples count, evenly spread: another training changes all of it. Reading 8B
# weights whole takes half a minute from a disk.
HASHED_WHOLE_BYTES = 64 << 20
NUM_SAMPLES, SAMPLE_BYTES = 64, 64 << 10


@dataclass(frozen=True)
class Manifest:
    """rows: of the output. input_end: the index after the last row of the whole input, all shards', known once it was
    read to its end and each row asked for is in the output."""

    settings: dict[str, Any]
    input_end: int | None = None
    rows: int = 0

    @property
    def complete(self) -> bool:
        return self.input_end is not None

    @property
    def hash_key(self) -> bytes:
        """32 bytes that stand for the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode("utf-8", "surrogatepass")).digest()

    def save(self, path: Path) -> None:
        """Durably, and whole or not at all."""
        content = {"format": FORMAT, "minisgl": minisgl.__version__, **vars(self)}
        with replaced(path) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")

    def differences(self, other: "Manifest") -> dict[str, str]:
        """By setting and in words, what is another in `other`."""
        names = [*self.settings, *(name for name in other.settings if name not in self.settings)]
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        return {name: f"{name} was {_short(was)}, is {_short(now)}" for name, was, now in pairs if was != now}


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + MANIFEST_SUFFIX)


def load_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None when there is none. MinisglError when the file is something else."""
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise MinisglError(f"{path} was written by minisgl {values['minisgl']}, which keeps it in another form")
        input_end = values["input_end"]
        return Manifest(dict(values["settings"]), None if input_end is None else int(input_end), int(values["rows"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MinisglError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, MinisglError):
            raise
        raise MinisglError(f"{path} is no manifest of minisgl: --fresh starts anew, or name another output") from error


def model_revision(folder: Path) -> str:
    """A name for what is in a model's folder: the hub's commit, or a hash of its files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if num_bytes <= HASHED_WHOLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(NUM_SAMPLES):
                file.seek((num_bytes - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
