"""The life of batches and files without an engine: expiry, room for others, folders."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minisgl.errors import MinisglError, RequestError
from minisgl.request import Result, Usage
from minisgl.server import batches as batches_module
from minisgl.server.batches import Batches
from minisgl.server.files import FileStore, lock_folder
from minisgl.server.records import Batch

URL = "/v1/completions"


class Rows:
    """Answers a line when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Event] = []
        self.num_started = 0

    async def answer(self, row: Any, request_id: str) -> list[Result]:
        self.num_started += 1
        event = asyncio.Event()
        self.waiting.append(event)
        await event.wait()
        return [Result("text", [1], "stop", Usage(3, 1))]

    async def release(self, count: int) -> None:
        for _ in range(count):
            self.waiting.pop(0).set()
        await asyncio.sleep(0.05)


class World:
    """Batches over a folder, with an engine that runs 8 answers at once."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.files = Rows(), FileStore(folder / "files", 1 << 20)
        ready = SimpleNamespace(max_running=8)
        self.answering: Any = SimpleNamespace(engine=SimpleNamespace(ready=ready), draining=False, num_admitted=0)
        model: Any = SimpleNamespace(name="m", check=lambda name: None, spell=str)
        rows: Any = self.rows
        self.batches = Batches(folder / "batches", self.files, rows, self.answering, model)

    def create(self, num_lines: int) -> Batch:
        line = {"method": "POST", "url": URL, "body": {"prompt": "a"}}
        lines = (json.dumps({"custom_id": f"{n}", **line}).encode() + b"\n" for n in range(num_lines))
        return self.batches.create(URL, self.files.create("lines", "batch", lines).id, None)


async def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        await asyncio.sleep(0.01)


def test_a_batch_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "POLL_S", 0.01)

    async def run() -> None:
        world = World(tmp_path)
        batch = world.create(20)
        await until(lambda: world.rows.num_started == 4)  # half of the engine
        next_batch = world.create(2)  # not before: of two that are checked at once, either may begin
        world.answering.num_admitted = 6
        await world.rows.release(3)
        assert world.rows.num_started == 5  # what the others leave: 2 at once
        world.answering.num_admitted = 100
        await world.rows.release(2)
        assert world.rows.num_started == 6  # one is always allowed
        world.answering.draining = True
        await world.rows.release(1)
        assert world.rows.num_started == 6
        world.answering.draining, world.answering.num_admitted = False, 0
        await until(lambda: world.rows.num_started == 10)
        assert next_batch.status == "in_progress" and next_batch.request_counts.completed == 0
        while batch.status != "completed" or next_batch.status != "completed":
            await world.rows.release(len(world.rows.waiting))
        assert batch.request_counts.completed == 20 and next_batch.request_counts.completed == 2

    asyncio.run(run())


def test_what_a_batch_did_not_get_to_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "WINDOW_S", 4)

    async def run() -> None:
        world = World(tmp_path)
        batch = world.create(5)
        await until(lambda: world.rows.num_started == 4)
        await world.rows.release(2)
        await until(lambda: batch.status == "expired")
        assert batch.expired_at and (batch.request_counts.completed, batch.request_counts.failed) == (2, 3)
        assert batch.output_file_id and batch.error_file_id
        answered, errors = (
            [json.loads(line) for line in world.files.path(id).read_text().splitlines()]
            for id in (batch.output_file_id, batch.error_file_id)
        )
        assert len(answered) == 2 and len(errors) == 3
        assert {row["error"]["code"] for row in errors} == {"batch_expired"}
        assert batch.usage is not None and batch.usage["input_tokens"] == 6

    asyncio.run(run())


def test_a_server_that_ends_leaves_batches_to_the_next(tmp_path: Path) -> None:
    async def first() -> str:
        world = World(tmp_path)
        batch = world.create(5)
        await until(lambda: world.rows.num_started == 4)
        await world.rows.release(2)
        await world.batches.close()
        return batch.id

    async def second(id: str) -> None:
        world = World(tmp_path)
        batch = world.batches.get(id)
        assert batch.status == "in_progress"
        world.batches.start()
        await until(lambda: world.rows.num_started == 3)  # the two that were answered are not asked again
        assert batch.request_counts.completed == 2
        await world.rows.release(3)
        await until(lambda: batch.status == "completed")

    asyncio.run(second(asyncio.run(first())))


def test_files_expire_and_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path, 10)
    file = store.create("a" * 1000, "batch", [b"12345"], expires_after_s=3600)
    assert len(file.filename) == 255
    with pytest.raises(RequestError, match="take too much room"):
        store.create("b", "batch", [b"123", b"456"])
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".data", ".json"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert store.all() == [] and list(tmp_path.iterdir()) == []
    assert store.create("b", "batch", [b"123", b"456"]).bytes == 6


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    file = FileStore(tmp_path, 10).create("a", "batch", [b"1"])
    for name in ("file-1.data", "file-1.data.tmp", f"{file.id}.data.tmp"):
        (tmp_path / name).touch()
    assert [each.id for each in FileStore(tmp_path, 10).all()] == [file.id]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{file.id}.data", f"{file.id}.json"]


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    lock_folder(tmp_path / "new")
    with pytest.raises(MinisglError, match="another server has --files-dir"):
        lock_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(MinisglError, match="cannot be written: "):
        lock_folder(tmp_path / "file" / "x")
