"""Files that are replaced: what a path is stays what it is."""

import os
from pathlib import Path
from threading import Thread

import pytest

from minisgl.batch_run.files import replaced


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with replaced(link) as file:
        file.write(b"new")
        assert target.read_text() == "old"
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link", "target"]


def test_a_failure_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    with replaced(pipe) as file:
        file.write(b"new")
    reader.join(timeout=60)
    assert read == [b"new"] and pipe.is_fifo()
