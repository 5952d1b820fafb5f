"""The journal survives what a crash can leave: torn writes at every byte, and full disks."""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.batch_run import journal as module
from minisgl.batch_run.answers import Line, format_line
from minisgl.batch_run.journal import Journal
from minisgl.batch_run.rows import Head, RowError
from minisgl.errors import MinisglError
from minisgl.request import Result, Usage


def line(index: int, text: str = "", failed: bool = False, form: str = "row") -> Line:
    head = Head(index, 1000 + index, f"id {index}", form=form)
    return format_line(head, RowError("invalid_row", text) if failed else [Result(text, [], "stop", Usage(1, 1, 0))])


def opened(path: Path) -> Journal:
    journal = Journal(path)
    journal.load()
    return journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.jsonl")
    yield journal
    journal.close()


texts = st.text(st.characters(), max_size=20)
lines = st.lists(st.tuples(texts, st.booleans(), st.sampled_from(["row", "chat.completion"])), max_size=6).map(
    lambda rows: [line(index * 3, *row) for index, row in enumerate(rows)]
)


@mock.patch.object(module.os, "fsync")  # what is checked is content; real ones take a minute
@settings(deadline=None, max_examples=8)
@given(written=lines)
def test_a_write_that_is_torn_at_any_byte(
    fsync: mock.Mock, tmp_path_factory: pytest.TempPathFactory, written: list[Line]
) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal.jsonl"
    content = b"".join(one.data for one in written)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        journal = opened(path)
        whole = content[:cut].count(b"\n")
        assert journal.num_rows == whole
        assert journal.num_failed == sum(one.failed for one in written[:whole])
        journal.append(written[whole:])
        journal.close()
        assert path.read_bytes() == content


@settings(deadline=None, max_examples=100)
@given(written=lines, damage=st.binary(max_size=40), place=st.integers(0, 5))
def test_damage_costs_no_other_row(
    tmp_path_factory: pytest.TempPathFactory, written: list[Line], damage: bytes, place: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "journal.jsonl"
    damage = damage.replace(b"\n", b"")  # one line, such as the zeros that some file systems leave
    content = [one.data for one in written]
    path.write_bytes(b"".join([*content[:place], damage + b"\n", *content[place:]]))
    journal = opened(path)
    assert [journal.key(one.index) for one in written] == [one.key for one in written]
    assert b"".join(journal.lines(ordered=False)) == path.read_bytes() == b"".join(content)
    journal.close()


def test_lines_in_both_orders(journal: Journal) -> None:
    order = [5, 0, 9, 2]
    journal.append([line(index, f"text {index}") for index in order])
    assert list(journal.lines(ordered=False)) == [line(index, f"text {index}").data for index in order]
    assert list(journal.lines(ordered=True)) == [line(index, f"text {index}").data for index in sorted(order)]
    assert journal.read(9) == line(9, "text 9").data
    assert (journal.key(9), journal.key(1), journal.key(100)) == (1009, 0, 0)


def test_a_row_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(line(0, "first").data + line(0, "second").data + line(1).data)
    journal = opened(path)
    assert path.read_bytes() == line(0, "first").data + line(1).data
    assert journal.num_rows == 2
    journal.close()


def test_keeping_some_lines_keeps_the_lock(journal: Journal) -> None:
    journal.append([line(0), line(1, "bad", failed=True), line(2)])
    journal.keep(lambda each: not each.failed)
    assert journal.path.read_bytes() == line(0).data + line(2).data
    assert (journal.num_rows, journal.num_failed, journal.key(1)) == (2, 0, 0)
    with pytest.raises(MinisglError, match="another minisgl is writing"):
        Journal(journal.path)
    journal.append([line(1)])
    assert journal.path.read_bytes() == line(0).data + line(2).data + line(1).data


def test_one_process_at_a_time(journal: Journal) -> None:
    with pytest.raises(MinisglError, match="another minisgl is writing"):
        Journal(journal.path)


def test_rows_are_durable_by_the_next_sync(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: [fsync(fd), synced.append(os.fstat(fd).st_size)])
    assert module.SYNC_EVERY_S <= 0.5
    journal.append([line(0)])
    assert journal.path.read_bytes() == line(0).data, "the operating system has it at once"
    started = time.monotonic()
    while journal.size not in synced:
        assert time.monotonic() - started < 20  # half a second, where nothing else runs
        time.sleep(0.01)


def test_a_sync_that_fails_is_not_forgotten(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append([line(0)])

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(MinisglError, match="Input/output error"):
        journal.finish()
    with pytest.raises(MinisglError, match="Input/output error"):
        journal.append([line(1)])
    monkeypatch.undo()


@pytest.mark.parametrize("room", range(0, 400, 37))
def test_a_disk_that_fills_up_leaves_whole_lines(journal: Journal, room: int) -> None:
    journal.append([line(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + room, limits[1]))
    try:
        with pytest.raises(MinisglError, match="cannot write .*free some space"):
            journal.append([line(1), line(2), line(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    whole = 1 + room // len(line(1).data)
    assert journal.num_rows == whole
    assert journal.path.read_bytes() == b"".join(line(index).data for index in range(whole))
    journal.append([line(index) for index in range(whole, 4)])
    assert journal.num_rows == 4
