"""What the server keeps for clients: OpenAI's file and batch objects, each in a file of JSON.

    https://platform.openai.com/docs/api-reference/files/object
    https://platform.openai.com/docs/api-reference/batch/object

Knows objects and ids. Does not know what is in files or how batches are answered. Of a client nothing becomes a path:
ids are drawn here, and only such ids are looked up.
"""

import re
import secrets
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from minisgl.batch_run.files import replaced
from minisgl.openai.errors import FieldError


class StoredFile(msgspec.Struct, kw_only=True):
    """OpenAI's file object. Times are in seconds since 1970."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"


class Counts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """OpenAI's batch object. Times are in seconds since 1970."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str | None = None
    errors: dict[str, Any] | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    output_expires_after: dict[str, Any] | None = None


Entry = TypeVar("Entry", StoredFile, Batch)


class Catalogue(Generic[Entry]):
    """Objects by id, each also in a file ID.json in `folder`, which is replaced whole or not at all. What else belongs
    to one is in files whose names begin with its id."""

    def __init__(self, folder: Path, kind: type[Entry], prefix: str, param: str) -> None:
        """`param` is what requests call an id of these."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self._prefix, self._param = prefix, param
        self._is_id = re.compile(f"{prefix}[0-9a-f]{{32}}").fullmatch
        found = [msgspec.json.decode(path.read_bytes(), type=kind) for path in folder.glob(f"{prefix}*.json")]
        found.sort(key=lambda entry: (entry.created_at, entry.id))
        self._entries: dict[str, Entry] = {entry.id: entry for entry in found}
        for path in folder.iterdir():  # what a crash left
            if path.name.partition(".")[0] not in self._entries or path.suffix == ".tmp":
                path.unlink()

    def new_id(self) -> str:
        return self._prefix + secrets.token_hex(16)

    def all(self) -> list[Entry]:
        """In the order in which they were made."""
        return list(self._entries.values())

    def get(self, id: str) -> Entry:
        """FieldError when there is none of this id."""
        entry = self._entries.get(id) if self._is_id(id) else None
        if entry is None:
            raise FieldError(f"there is no {self._param.removesuffix('_id')} {id[:80]!r}", self._param, "not_found")
        return entry

    def put(self, id: str, entry: Entry) -> None:
        """Keep it, durably. MinisglError when it cannot be written."""
        with replaced(self.folder / f"{id}.json") as file:
            file.write(msgspec.json.encode(entry))
        self._entries[id] = entry

    def drop(self, id: str) -> None:
        (self.folder / f"{id}.json").unlink(missing_ok=True)
        self._entries.pop(id, None)
