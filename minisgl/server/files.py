"""/v1/files: what clients uploaded and what batches made, in a folder that nobody else may enter.

    https://platform.openai.com/docs/api-reference/files

Knows ids, names, sizes and expiry. Does not know what is in files, or HTTP. Of a client nothing becomes a path: files
are stored by ids that are drawn here, and only such ids are looked up.
"""

import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from minisgl.batch_run.files import replaced
from minisgl.errors import MinisglError, RequestError
from minisgl.openai.errors import FieldError

log = logging.getLogger("minisgl.server")

MAX_NAME_CHARS = 255


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


Entry = TypeVar("Entry", bound=msgspec.Struct)


class Catalogue(Generic[Entry]):
    """Objects by id, each also in a file of JSON in `folder`, which is replaced whole or not at all."""

    def __init__(self, folder: Path, kind: type[Entry], prefix: str, param: str) -> None:
        """`param` is what requests call an id of these."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self._prefix, self._param = prefix, param
        self._is_id = re.compile(f"{prefix}[0-9a-f]{{32}}").fullmatch
        found = [msgspec.json.decode(path.read_bytes(), type=kind) for path in folder.glob(f"{prefix}*.json")]
        found.sort(key=lambda entry: (entry.created_at, entry.id))  # type: ignore[attr-defined]
        self._entries: dict[str, Entry] = {entry.id: entry for entry in found}  # type: ignore[attr-defined]

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


class FileStore:
    """The files of one server."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: of all uploaded files together."""
        self._files = Catalogue(folder, StoredFile, "file-", "file_id")
        self._max_bytes = max_bytes
        known = {file.id for file in self._files.all()}
        for path in folder.iterdir():  # what a crash left
            if path.name.partition(".")[0] not in known or path.suffix == ".tmp":
                path.unlink()

    def create(
        self,
        filename: str,
        purpose: str,
        chunks: Iterable[bytes],
        *,
        expires_after_s: int | None = None,
        id: str | None = None,
    ) -> StoredFile:
        """Keep a file, durably. `id`: of one that the server makes, which has no limit and takes the place of one that
        was begun before. RequestError when there is no room, MinisglError when it cannot be written."""
        self._expire()
        room = None if id else self._max_bytes - sum(file.bytes for file in self._files.all())
        id, now, size = id or self._files.new_id(), int(time.time()), 0
        with replaced(self.path(id)) as file:
            for chunk in chunks:
                size += len(chunk)
                if room is not None and size > room:
                    raise RequestError("the files of this server take too much room: delete some, then send it again")
                file.write(chunk)
        expires_at = None if expires_after_s is None else now + expires_after_s
        name = filename[-MAX_NAME_CHARS:]
        stored = StoredFile(id=id, bytes=size, created_at=now, expires_at=expires_at, filename=name, purpose=purpose)
        self._files.put(id, stored)
        return stored

    def new_id(self) -> str:
        """For a file that the server makes."""
        return self._files.new_id()

    def all(self) -> list[StoredFile]:
        self._expire()
        return self._files.all()

    def get(self, id: str) -> StoredFile:
        """FieldError when there is no such file."""
        self._expire()
        return self._files.get(id)

    def path(self, id: str) -> Path:
        """Where the content of a file is."""
        return self._files.folder / f"{id}.data"

    def delete(self, id: str) -> None:
        """FieldError when there is no such file."""
        self._files.get(id)
        self._files.drop(id)
        self.path(id).unlink(missing_ok=True)

    def _expire(self) -> None:
        now = time.time()
        for file in self._files.all():
            if file.expires_at is not None and file.expires_at <= now:
                with suppress(RequestError):  # another thread was first
                    self.delete(file.id)


def lock_folder(folder: Path) -> int:
    """Make the folder this process's own, until the descriptor is closed. MinisglError when another server has it or
    it cannot be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MinisglError(f"--files-dir {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise MinisglError(f"another server has --files-dir {folder}: name another folder") from None
    return fd
