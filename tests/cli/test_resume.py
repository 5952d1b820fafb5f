"""The same command again goes on; another command does not; nothing is lost or mixed on the way."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from minisgl.batch_run import job
from minisgl.batch_run.journal import Journal
from minisgl.batch_run.parser import RowParser
from tests.cli.conftest import Invoke, read_rows


def stop_at(fake_llm: Any, monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    monkeypatch.setattr(fake_llm, "fail_at_step", step)


@pytest.fixture(params=["out.jsonl", "out.csv", "out.parquet", "ordered"])
def output(request: pytest.FixtureRequest) -> list[str]:
    return ["-o", "out.jsonl", "--ordered"] if request.param == "ordered" else ["-o", request.param]


def read(path: str) -> list[dict[str, Any]]:
    if path.endswith(".csv"):
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    if path.endswith(".parquet"):
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_job_in_pieces(
    invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch, output: list[str]
) -> None:
    for _ in range(4):
        stop_at(fake_llm, monkeypatch, 2)
        done = invoke("run", prompts, *output, "--max-running", 3)
        assert done.exit_code == 2 and "the same command goes on from there" in done.stderr
    stop_at(fake_llm, monkeypatch, None)
    done = invoke("run", prompts, *output, "--max-running", 8)  # how fast it goes may change
    assert done.exit_code == 0, done.output
    asked = [index for llm in fake_llm.made for index in llm.prompts]
    rows = read(output[1])
    assert sorted(int(row["index"]) for row in rows) == list(range(10))
    assert {row["text"] for row in rows} == {f"answer {index}" for index in range(10)}
    assert len(asked) > 10, "rows that did not end were asked again"
    if "--ordered" in output:
        assert [row["index"] for row in rows] == list(range(10))
    before = Path(output[1]).stat().st_mtime_ns
    assert invoke("run", prompts, *output).exit_code == 0
    assert Path(output[1]).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        ["--temperature", "0.5"],
        ["-m", "some/model"],
        ["--chat"],
        ["--system", "Be brief."],
        ["--max-len", "50"],
        ["--n", "2"],
        ["--prompt-column", "prompt"],
        ["--shard", "1/2"],
    ],
    ids=" ".join,
)
def test_another_command_is_not_mixed_in(invoke: Invoke, prompts: Path, fake_llm: Any, change: list[str]) -> None:
    assert invoke("run", prompts, "-o", "out.jsonl").exit_code == 0
    before = Path("out.jsonl").read_bytes()
    done = invoke("run", prompts, "-o", "out.jsonl", *change)
    assert done.exit_code == 2
    assert "was made by another command" in done.stderr and "--fresh" in done.stderr
    assert Path("out.jsonl").read_bytes() == before and len(fake_llm.made) == 1
    assert invoke("run", prompts, "-o", "out.jsonl", *change, "--fresh").exit_code == 0
    assert Path("out.jsonl").read_bytes() != before
    assert invoke("run", prompts, "-o", "out.jsonl", *change).exit_code == 0


def test_another_revision_of_the_model(invoke: Invoke, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("run", prompts).exit_code == 0
    monkeypatch.setattr(job, "revision", lambda model: "trained further")
    done = invoke("run", prompts)
    assert (done.exit_code, 'revision was "as it was", is "trained further"' in done.stderr) == (2, True)


def test_a_device_with_another_dtype(invoke: Invoke, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a job that was begun on a GPU goes on on a CPU: `auto` is bfloat16 there and float32 here."""
    here = job.resolved_dtype
    monkeypatch.setattr(job, "resolved_dtype", lambda model, engine: engine.get("dtype", "bfloat16"))
    assert invoke("run", prompts, "--limit", "4").exit_code == 0
    monkeypatch.setattr(job, "resolved_dtype", here)
    done = invoke("run", prompts)
    assert (done.exit_code, 'dtype was "bfloat16", is "float32". --dtype bfloat16 goes on' in done.stderr) == (2, True)
    assert invoke("run", prompts, "--dtype", "bfloat16").exit_code == 0
    assert len(read_rows("prompts.results.jsonl")) == 10


def test_an_input_that_has_changed(invoke: Invoke, prompts: Path) -> None:
    assert invoke("run", prompts).exit_code == 0
    before = Path("prompts.results.jsonl").read_bytes()
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines[:3], '{"prompt": "another"}', *lines[4:]]))
    done = invoke("run", prompts)
    assert done.exit_code == 2 and "the input has changed: line 4 is not the row" in done.stderr
    prompts.write_text("\n".join(lines[:6]))
    done = invoke("run", prompts)
    assert done.exit_code == 2 and "4 rows in prompts.results.jsonl are no longer in it" in done.stderr.replace(
        f"{prompts.parent}/", ""
    )
    assert Path("prompts.results.jsonl").read_bytes() == before


@pytest.mark.parametrize("dedup", [False, True])
def test_what_is_done_is_parsed_only_where_a_later_row_may_ask_the_same(
    invoke: Invoke, tmp_path: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch, dedup: bool
) -> None:
    path, flags = tmp_path / "some.jsonl", ["--dedup"] if dedup else []
    lines = [f'{{"prompt": "{index}"}}\n' for index in range(6)]
    path.write_text("".join(lines))
    assert invoke("run", path, "-o", "out.jsonl", *flags).exit_code == 0
    parsed: list[int] = []
    parse = RowParser.parse
    monkeypatch.setattr(RowParser, "parse", lambda self, record: (parsed.append(record.index), parse(self, record))[1])
    path.write_text("".join([*lines, lines[2]]))
    assert invoke("run", path, "-o", "out.jsonl", *flags).exit_code == 0
    assert parsed == ([*range(7)] if dedup else [6])
    assert [row["text"] for row in read_rows(Path("out.jsonl"))][2::4] == ["answer 2", f"answer {2 if dedup else 6}"]


def test_rows_that_were_added_are_answered(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    assert invoke("run", prompts, "--limit", "4").exit_code == 0
    assert invoke("run", prompts).exit_code == 0
    with prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert invoke("run", prompts).exit_code == 0
    assert [sorted(llm.prompts) for llm in fake_llm.made] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    assert len(read_rows("prompts.results.jsonl")) == 11


def test_a_file_of_something_else_is_not_touched(
    invoke: Invoke, prompts: Path, fake_llm: Any, output: list[str]
) -> None:
    Path(output[1]).write_text("precious\n")
    done = invoke("run", prompts, *output)
    assert done.exit_code == 2 and "--fresh replaces it" in done.stderr
    assert Path(output[1]).read_text() == "precious\n" and not fake_llm.made
    assert sorted(path.name for path in Path().iterdir()) == sorted([output[1], "prompts.jsonl"])
    assert invoke("run", prompts, *output, "--fresh").exit_code == 0
    assert len(read(output[1])) == 10


def test_fresh_replaces_nothing_before_the_first_row(
    invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("run", prompts).exit_code == 0
    before = Path("prompts.results.jsonl").read_bytes()
    stop_at(fake_llm, monkeypatch, 1)
    assert invoke("run", prompts, "--fresh", "--temperature", "1").exit_code == 2
    assert Path("prompts.results.jsonl").read_bytes() == before
    stop_at(fake_llm, monkeypatch, None)
    assert invoke("run", prompts).exit_code == 0  # the old command still goes on
    assert Path("prompts.results.jsonl").read_bytes() == before


def test_retry_errors_does_only_failed_rows(
    invoke: Invoke, fake_llm: Any, monkeypatch: pytest.MonkeyPatch, output: list[str]
) -> None:
    rows = [{"prompt": "good"}, {"prompt": "x", "stop": "ENGINE"}, {"prompt": "good"}, {"prompt": "x" * 101}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert invoke("run", "in.jsonl", *output).exit_code == 1
    assert invoke("run", "in.jsonl", *output).exit_code == 1, "failed rows are done, and still failed"
    assert len(fake_llm.made) == 1
    monkeypatch.setattr(fake_llm, "answer", lambda self, request: self.good_answer(request))
    done = invoke("run", "in.jsonl", *output, "--retry-errors")
    assert done.exit_code == 1 and "4 (2 of them before), 1 with errors" in done.stderr
    assert list(fake_llm.made[1].prompts) == [1]
    found = sorted(read(output[1]), key=lambda row: int(row["index"]))
    assert [row["finish_reason"] for row in found] == ["stop", "stop", "stop", "error"]
    done = invoke("run", "in.jsonl", *output, "--retry-errors", "--fresh")
    assert (done.exit_code, "not both" in done.stderr) == (2, True)


def test_a_torn_line_is_repaired(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    assert invoke("run", prompts).exit_code == 0
    results = Path("prompts.results.jsonl")
    results.write_bytes(results.read_bytes()[:-20])
    assert invoke("run", prompts).exit_code == 0
    assert len(fake_llm.made[1].prompts) == 1
    assert len(read_rows(results)) == 10


def test_a_table_that_was_deleted_is_written_again(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    assert invoke("run", prompts, "-o", "out.csv").exit_code == 0
    before = Path("out.csv").read_bytes()
    Path("out.csv").unlink()
    assert invoke("run", prompts, "-o", "out.csv").exit_code == 0
    assert Path("out.csv").read_bytes() == before and len(fake_llm.made) == 1


def test_a_manifest_that_is_none(invoke: Invoke, prompts: Path) -> None:
    assert invoke("run", prompts).exit_code == 0
    Path("prompts.results.jsonl.manifest.json").write_text("[]")
    done = invoke("run", prompts)
    assert (done.exit_code, "is no manifest" in done.stderr) == (2, True)
    assert invoke("run", prompts, "--fresh").exit_code == 0


NOBODY = 65534


def test_outputs_without_permission(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    locked = Path("locked")
    locked.mkdir()
    (locked / "old").touch(0o400)
    locked.chmod(0o555)
    Path().chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or NOBODY)  # root may write anywhere
    try:
        for name in ("new", "old"):
            done = invoke("run", "prompts.jsonl", "-o", locked / name)
            assert (done.exit_code, "cannot be written" in done.stderr) == (2, True), done.output
    finally:
        os.seteuid(user)
    assert not fake_llm.made and [path.name for path in locked.iterdir()] == ["old"]


def test_shards_and_merge(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    parts = [f"prompts.{number}-of-3.results.jsonl" for number in (1, 2, 3)]
    for number in (1, 2):
        assert invoke("run", prompts, "--shard", f"{number}/3").exit_code == 0
    done = invoke("merge", *parts[:2], "-o", "all.csv")
    assert done.exit_code == 2 and "shards are missing: 3/3" in done.stderr
    assert invoke("run", prompts, "--shard", "3/3", "--limit", "1").exit_code == 0
    done = invoke("merge", *parts, "-o", "all.csv")
    assert done.exit_code == 2 and "is not complete" in done.stderr
    assert invoke("run", prompts, "--shard", "3/3").exit_code == 0
    done = invoke("merge", *parts, parts[0], "-o", "all.csv")
    assert done.exit_code == 2 and "both shard 1/3" in done.stderr
    assert not Path("all.csv").exists()
    assert invoke("merge", *parts, "-o", "all.csv").exit_code == 0
    assert [int(row["index"]) for row in read("all.csv")] == list(range(10))
    done = invoke("merge", *parts, "-o", "all.csv")
    assert done.exit_code == 2 and "all.csv exists" in done.stderr
    lines = Path(parts[0]).read_text().splitlines(keepends=True)
    Path(parts[0]).write_text("".join(lines[1:]))
    done = invoke("merge", *parts, "-o", "all.jsonl")
    assert done.exit_code == 2 and "has 3 of 4 rows" in done.stderr
    assert invoke("run", prompts, "--shard", "1/3", "--fresh", "--temperature", "0").exit_code == 0
    done = invoke("merge", *parts, "-o", "all.jsonl")
    assert done.exit_code == 2 and "of two commands" in done.stderr
    assert "I from 1 to N" in invoke("run", prompts, "--shard", "4/3").stderr


def test_shards_of_machines_with_other_folders(invoke: Invoke, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        folder = Path(f"machine-{number}")
        folder.mkdir()
        (folder / prompts.name).write_bytes(prompts.read_bytes())
        model = folder / "model"
        assert invoke("run", folder / prompts.name, "-m", model, "--shard", f"{number}/2").exit_code == 0
    parts = [f"machine-{number}/prompts.{number}-of-2.results.jsonl" for number in (1, 2)]
    assert invoke("merge", *parts, "-o", "all.jsonl").exit_code == 0
    assert [row["index"] for row in read("all.jsonl")] == list(range(10))


def test_a_shard_of_a_shorter_input_is_not_merged(invoke: Invoke, prompts: Path) -> None:
    assert invoke("run", prompts, "--shard", "1/2").exit_code == 0
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:6]))
    assert invoke("run", prompts, "--shard", "2/2").exit_code == 0
    done = invoke("merge", "prompts.1-of-2.results.jsonl", "prompts.2-of-2.results.jsonl", "-o", "all.jsonl")
    assert done.exit_code == 2 and "one had 10 rows, the other 6" in done.stderr
    assert not Path("all.jsonl").exists()


def test_merge_leaves_the_parts_as_they_are(invoke: Invoke, prompts: Path) -> None:
    assert invoke("run", prompts).exit_code == 0
    part = Path("prompts.results.jsonl")
    part.write_bytes(part.read_bytes() + b"torn")
    part.chmod(0o444)
    before = part.read_bytes()
    assert invoke("merge", part, "-o", "all.jsonl").exit_code == 0
    assert part.read_bytes() == before and len(read("all.jsonl")) == 10


@pytest.mark.parametrize("flags", [[], ["--ordered"]], ids=["as they finish", "ordered"])
def test_an_output_that_is_being_written(invoke: Invoke, prompts: Path, fake_llm: Any, flags: list[str]) -> None:
    """Ordered or not, and whatever of it is there yet."""
    for first in ("prompts.results.jsonl", "prompts.results.jsonl.journal.jsonl"):
        held = Journal(Path(first))
        done = invoke("run", prompts, "--fresh", *flags)
        assert (done.exit_code, "another minisgl is writing" in done.stderr) == (2, True)
        held.close()
        assert [path.name for path in Path().glob("*.results*")] == [first]
        Path(first).unlink()
    assert not fake_llm.made
