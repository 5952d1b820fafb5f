"""Reading lines of any kind; which files may be written, and when an old one is replaced."""

import io
import os
import resource
import sys
from pathlib import Path

import pytest

from minisgl.batch_run import reader
from minisgl.batch_run.reader import count_rows, open_input, read_lines, read_rows
from minisgl.batch_run.rows import BadRow
from minisgl.batch_run.writer import ResultWriter, default_output
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams


def lines(data: bytes) -> list[tuple[int, bytes | None]]:
    return list(read_lines(io.BytesIO(data)))


def test_blank_lines_are_skipped_and_counted() -> None:
    assert lines(b"a\n\n  \t\nb\n") == [(0, b"a"), (3, b"b")]


def test_windows_files() -> None:
    assert lines(b"\xef\xbb\xbfa\r\n\r\nb\r\n") == [(0, b"a"), (2, b"b")]


def test_a_last_line_without_an_end_is_a_line() -> None:
    assert lines(b"a\nb") == [(0, b"a"), (1, b"b")]
    assert lines(b"") == []


@pytest.mark.parametrize("length", [16, 17, 31, 32, 33, 100])
def test_a_line_that_is_too_long_is_one_bad_row(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 16)
    data = b"a\n" + b"x" * length + b"\nb\n"
    assert lines(data) == [(0, b"a"), (1, b"x" * length if length == 16 else None), (2, b"b")]
    assert lines(b"x" * length) == [(0, b"x" * length if length == 16 else None)]
    row = list(read_rows(io.BytesIO(b"x" * 40), SamplingParams()))[0]
    assert isinstance(row, BadRow) and "longer than" in row.error.message


def test_rows_are_parsed_as_they_are_asked_for() -> None:
    file = io.BytesIO(b'{"prompt": "x"}\n' * 10)
    rows = read_rows(file, SamplingParams())
    next(rows)
    assert file.tell() == len(b'{"prompt": "x"}\n')
    assert len(list(read_rows(io.BytesIO(b"x\n\n" * 10), SamplingParams(), limit=4))) == 4


def test_count_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a\n\nb\nc")
    assert count_rows(str(path)) == 3
    assert count_rows(str(path), limit=2) == 2
    assert count_rows("-") is None
    assert count_rows("/dev/null") is None


def test_open_input_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match="does not exist"):
        open_input(str(tmp_path / "none.jsonl"))
    with pytest.raises(MinisglError, match="is a folder"):
        open_input(str(tmp_path))


def test_default_output() -> None:
    assert default_output("data/prompts.jsonl") == "data/prompts.results.jsonl"
    assert default_output("part.01") == "part.01.results.jsonl"
    assert default_output("-") == "-"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n')
    return path


def test_the_input_is_never_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    with source.open("rb") as file:
        for target in (source, tmp_path / "link", tmp_path / "hard", tmp_path / "." / "in.jsonl"):
            with pytest.raises(MinisglError, match="is the input"):
                ResultWriter(str(target), file)


def test_outputs_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    with source.open("rb") as file:
        with pytest.raises(MinisglError, match="is a folder"):
            ResultWriter(str(tmp_path), file)
        with pytest.raises(MinisglError, match="does not exist; make it"):
            ResultWriter(str(tmp_path / "no" / "out.jsonl"), file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_outputs_without_permission(source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "old").touch(0o400)
    locked.chmod(0o500)
    with source.open("rb") as file:
        for name in ("new", "old"):
            with pytest.raises(MinisglError, match="cannot be written"):
                ResultWriter(str(locked / name), file)


def test_old_results_stay_until_the_first_new_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    with source.open("rb") as file:
        writer = ResultWriter(str(out), file)
    assert out.read_text() == "old\n"
    writer.write([b"1\n", b"2\n"])
    assert out.read_text() == "1\n2\n"  # before it is closed: a killed run has lost nothing
    writer.write([b"3\n"])
    writer.close()
    assert out.read_text() == "1\n2\n3\n"


def test_a_disk_that_fills_up_leaves_whole_lines(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with source.open("rb") as file:
        writer = ResultWriter(str(out), file)
    writer.write([b"first\n"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(MinisglError, match=f"cannot write {out}"):
            writer.write([b"second\n", b"third\n"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert out.read_bytes() == b"first\nsecond\n"
    assert writer.num_rows == 2


def test_a_finished_job_has_a_file(source: Path, tmp_path: Path) -> None:
    with source.open("rb") as file:
        ResultWriter(str(tmp_path / "out.jsonl"), file).finish()
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_closed_streams(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(MinisglError, match="stdin is closed"):
        open_input("-")
    with source.open("rb") as file, pytest.raises(MinisglError, match="stdout is closed"):
        ResultWriter("-", file)


def test_a_writer_that_wrote_nothing_leaves_no_file(source: Path, tmp_path: Path) -> None:
    with source.open("rb") as file:
        ResultWriter(str(tmp_path / "out.jsonl"), file).close()
    assert not (tmp_path / "out.jsonl").exists()
