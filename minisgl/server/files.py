"""/v1/files: what clients uploaded and what batches made, in a folder that nobody else may enter.

    https://platform.openai.com/docs/api-reference/files

Knows names, sizes and expiry. Does not know what is in files, or HTTP.
"""

import fcntl
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from minisgl.batch_run.files import replaced
from minisgl.errors import MinisglError, RequestError
from minisgl.server.records import Catalogue, StoredFile

MAX_NAME_CHARS = 255


class FileStore:
    """The files of one server."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: of all uploaded files together."""
        self._files = Catalogue(folder, StoredFile, "file-", "file_id")
        self._max_bytes = max_bytes

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
