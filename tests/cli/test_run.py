"""`minisgl run`: files, flags, messages and exit codes, on an engine that is not there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minisgl.errors import MinisglError
from minisgl.structured import ResponseFormat
from tests.cli.conftest import Invoke, read_rows


def test_the_quick_start(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    done = invoke("run", "prompts.jsonl")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "demo model" in done.stderr
    assert "10 rows" not in done.stderr and "10, 0 with errors" in done.stderr
    assert "prompts.results.jsonl" in done.stderr
    rows = read_rows("prompts.results.jsonl")
    assert [(row["id"], row["text"], row["finish_reason"]) for row in rows] == [
        (f"row {index}", f"answer {index}", "stop") for index in range(10)
    ]
    assert "token_ids" not in rows[0]
    before = Path("prompts.results.jsonl").read_bytes()
    done = invoke("run", "prompts.jsonl")
    assert done.exit_code == 0
    assert "10 (10 of them before)" in done.stderr and len(fake_llm.made) == 1, "nothing is left: no model is loaded"
    assert Path("prompts.results.jsonl").read_bytes() == before


def test_the_summary_has_all_figures(invoke: Invoke, prompts: Path) -> None:
    done = invoke("run", prompts, "--progress", "bar")
    for word in ("rows", "with errors", "prompt", "from the cache", "output", "tokens/s", " s\n", "results"):
        assert word in done.stderr, word
    assert "10/10" in done.stderr  # the bar


def test_the_model_is_the_one_that_was_named(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    done = invoke("run", prompts, "-m", "some/model")
    assert "demo model" not in done.stderr
    assert fake_llm.made[0].model == "some/model"
    assert fake_llm.made[0].closed


def test_only_flags_that_were_given_reach_the_engine(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    invoke("run", prompts)
    assert fake_llm.made[0].options == {}
    assert set(vars(fake_llm.made[0].params[0]).values()) == {None, ()}
    flags = "--dtype float32 --device cpu --max-running 4 --max-step-tokens 64 --page-size 32 --memory-fraction 0.5"
    flags += " --load-format dummy --cache none --evict lfu --seed 7"
    assert invoke("run", prompts, "--fresh", *flags.split()).exit_code == 0
    assert fake_llm.made[1].options == {
        "dtype": "float32",
        "device": "cpu",
        "max_running": 4,
        "max_step_tokens": 64,
        "page_size": 32,
        "memory_fraction": 0.5,
        "load_format": "dummy",
        "cache": "none",
        "evict": "lfu",
        "seed": 7,
    }


def test_a_row_wins_over_a_flag_and_a_flag_over_the_model(invoke: Invoke, fake_llm: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "max_tokens": 3, "ignore_eos": False}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--max-tokens 9 --temperature 0 --top-p 0.5 --top-k 4 --ignore-eos"
    assert invoke("run", "in.jsonl", *flags.split()).exit_code == 0
    first, second = (fake_llm.made[0].params[index] for index in range(2))
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (9, 0, 0.5, 4)
    assert first.ignore_eos is True and second.ignore_eos is False
    assert (second.max_tokens, second.temperature) == (3, 0)
    assert first.seed is None and first.min_p is None  # the engine's and the model's


def test_flags_of_lists_and_of_the_form_of_answers(invoke: Invoke, prompts: Path, fake_llm: Any) -> None:
    Path("schema.json").write_text('{"type": "object"}')
    flags = ["--stop", ".", "--stop", "!", "--stop-token-id", "5", "--stop-token-id", "6", "--bad-word", "x"]
    assert invoke("run", prompts, "--json-schema", "schema.json", *flags).exit_code == 0
    params = fake_llm.made[0].params[0]
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((".", "!"), (5, 6), ("x",))
    assert params.response_format == ResponseFormat(json_schema={"type": "object"})
    assert invoke("run", prompts, "--json-schema", '{"type":"object"}', *flags).exit_code == 0, "the same command"
    assert len(fake_llm.made) == 1, "it goes on, with nothing left"
    formats = {"--regex": "a+", "--choice": "yes", "--grammar": 'start: "a"'}
    for flag, text in formats.items():
        assert invoke("run", prompts, flag, text, "--fresh").exit_code == 0
        value = (text,) if flag == "--choice" else text
        assert fake_llm.made[-1].params[0].response_format == ResponseFormat(**{flag[2:]: value})
    Path("in.jsonl").write_text(json.dumps({"prompt": "x", "response_format": {"type": "json_object"}, "stop": "y"}))
    assert invoke("run", "in.jsonl", "--regex", "a", "--stop", "z").exit_code == 0
    params = fake_llm.made[-1].params[0]
    assert (params.response_format, params.stop) == (ResponseFormat(json_object=True), ("y",)), "the row's own"


def test_limit_and_token_ids(invoke: Invoke, prompts: Path) -> None:
    assert invoke("run", prompts, "--limit", "3", "--return-token-ids", "-o", "out").exit_code == 0
    assert [row["token_ids"] for row in read_rows("out")] == [[7], [7, 7], [7, 7, 7]]


def test_stdin_and_stdout(invoke: Invoke, prompts: Path) -> None:
    done = invoke("run", "-", input=b'{"prompt": "x"}\n')
    assert (done.exit_code, json.loads(done.stdout)["text"]) == (0, "answer 0")
    assert "stdout" in done.stderr
    done = invoke("run", prompts, "-o", "-")
    assert len(done.stdout.splitlines()) == 10
    invoke("run", "-", "-o", "out.jsonl", input=b'{"prompt": "x"}\n')
    assert len(read_rows("out.jsonl")) == 1


def test_chat(invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("run", prompts, "--chat")
    assert fake_llm.made[0].prompts[0] == [1, ord("p"), ord("0"), 2]
    from tests.batch_run.fake_llm import FakeTokenizer

    monkeypatch.setattr(FakeTokenizer, "has_chat_template", False)
    done = invoke("run", prompts, "--chat", "--fresh")
    assert (done.exit_code, "no chat template" in done.stderr) == (2, True)


def test_some_rows_fail(invoke: Invoke) -> None:
    Path("in.jsonl").write_text('{"prompt": "good"}\nbad\n{"prompt": "x", "max_tokens": -1}\n')
    done = invoke("run", "in.jsonl")
    assert done.exit_code == 1
    assert "2 of 3 rows failed: 1 invalid_json, 1 invalid_parameter" in done.stderr
    assert "line 2" in done.stderr
    assert [row["finish_reason"] for row in read_rows("in.results.jsonl")] == ["stop", "error", "error"]


def test_columns_that_no_row_has_are_named(invoke: Invoke) -> None:
    Path("in.jsonl").write_text('{"prompt": "x", "city": "Oslo"}\n{"prompt": "y"}\n')
    done = invoke("run", "in.jsonl", "--columns", "city,town")
    assert done.exit_code == 0 and "No row has 'town', which --columns names." in done.stderr
    assert "which --columns names" not in invoke("run", "in.jsonl", "--columns", "city", "--fresh").stderr


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_an_input_without_rows(invoke: Invoke, content: bytes) -> None:
    Path("in.jsonl").write_bytes(content)
    done = invoke("run", "in.jsonl")
    assert done.exit_code == 0
    assert "The input has no rows" in done.stderr
    assert Path("in.results.jsonl").read_bytes() == b""


CANNOT_START = [
    (["none.jsonl"], "does not exist"),
    ([""], "an input is an empty name"),
    (["prompts.jsonl", "-o", ""], "-o is an empty name"),
    (["none*.jsonl", "-o", "out.jsonl"], "no file matches"),
    (["empty"], "has no file to read"),
    (["prompts.jsonl", "-o", "prompts.jsonl"], "is the input"),
    (["prompts.jsonl", "-o", "no/such/folder/out.jsonl"], "does not exist; make it"),
    (["prompts.jsonl", "-o", "."], "is a folder"),
    (["prompts.jsonl", "-o", "out.parqet"], "name such a file with -o"),
    (["prompts.jsonl", "-o", "out.jsonl2"], "name such a file with -o"),
    (["prompts.jsonl", "-m", ""], "-m is empty"),
    (["prompts.jsonl", "--page-size", "17"], "must be a power of two from 16 to 256"),
    (["prompts.jsonl", "--page-size", "8"], "16<=x<=256"),
    (["prompts.jsonl", "--temperature", "-1"], "0<=x<=100"),
    (["prompts.jsonl", "--temperature", "nan"], "must be a number"),
    (["prompts.jsonl", "--max-tokens", "0"], "1<=x<="),
    (["prompts.jsonl", "--max-running", "0"], "1<=x<=65536"),
    (["prompts.jsonl", "--memory-fraction", "2"], "0.05<=x<=0.99"),
    (["prompts.jsonl", "--limit", "0"], "1<=x<="),
    (["prompts.jsonl", "--dtype", "int4"], "'float16'"),
    (["prompts.jsonl", "--cache", "big"], "'radix', 'none'"),
    (["prompts.jsonl", "--no-such-flag"], "No such option"),
    (["prompts.jsonl", "--json-schema", "none.json"], "there is no file 'none.json'"),
    (["prompts.jsonl", "--json-schema", '{"type": '], "json_schema is not valid JSON"),
    (["prompts.jsonl", "--grammar", "bad.lark"], "bad.lark is not UTF-8 text"),
    (["prompts.jsonl", "--regex", "a", "--choice", "b"], "not regex and choice"),
    ([], "Missing argument"),
]


@pytest.mark.parametrize(("args", "says"), CANNOT_START)
def test_jobs_that_cannot_start(invoke: Invoke, prompts: Path, fake_llm: Any, args: list[str], says: str) -> None:
    before = prompts.read_bytes()
    Path("empty").mkdir()
    Path("bad.lark").write_bytes(b"\xff")
    done = invoke("run", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: ") and "Traceback" not in done.stderr
    assert prompts.read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["bad.lark", "empty", "prompts.jsonl"]
    assert not fake_llm.made, "nothing is loaded for a job that cannot start"


@pytest.mark.parametrize(
    "error", [MinisglError("no such model: do this"), RuntimeError("odd\nthing"), OSError(28, "disk")]
)
def test_a_model_that_cannot_be_loaded(
    invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(fake_llm, "__init__", refuse)
    Path("prompts.results.jsonl").write_text("old\n")
    done = invoke("run", prompts, "-m", "some/model", "--fresh")
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("Error: ")
    assert "Traceback" in invoke("run", prompts, "-m", "some/model", "--fresh", "--debug").stderr
    assert Path("prompts.results.jsonl").read_text() == "old\n"


def test_an_engine_that_fails(invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_llm, "fail_at_step", 3)
    done = invoke("run", prompts)
    assert done.exit_code == 2
    finished = len(read_rows("prompts.results.jsonl"))
    assert 0 < finished < 10
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: stopped: RuntimeError: the device is gone second line")
    assert f"{finished} finished rows are in prompts.results.jsonl" in last.replace(f"{prompts.parent}/", "")
    assert "Traceback" not in done.stderr
    assert "Traceback" in invoke("run", prompts, "--debug").stderr
    monkeypatch.setattr(fake_llm, "fail_at_step", None)
    assert "of them before" in invoke("run", prompts).stderr
    assert len(read_rows("prompts.results.jsonl")) == 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full(invoke: Invoke, prompts: Path) -> None:
    done = invoke("run", prompts, "-o", "/dev/full")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: stopped: cannot write /dev/full: No space left on device; "
        "free some space and run the same command again, or name a file on another disk with -o; no row was written"
    )


def test_ctrl_c(invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_llm, "failure", KeyboardInterrupt())
    monkeypatch.setattr(fake_llm, "fail_at_step", 3)
    done = invoke("run", prompts)
    assert done.exit_code == 130
    finished = len(read_rows("prompts.results.jsonl"))
    assert done.stderr.splitlines()[-1].startswith(f"Interrupted: {finished} finished rows are in ")
    assert fake_llm.made[0].closed


def test_ctrl_c_before_the_first_row_keeps_old_results(
    invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.results.jsonl").write_text("old\n")
    monkeypatch.setattr(fake_llm, "failure", KeyboardInterrupt())
    monkeypatch.setattr(fake_llm, "fail_at_step", 1)
    done = invoke("run", prompts, "--fresh")
    assert done.stderr.splitlines()[-1] == "Interrupted: no row was written; the same command goes on from there"
    assert Path("prompts.results.jsonl").read_text() == "old\n"


def test_progress_and_report(invoke: Invoke, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.cli import progress

    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0)
    done = invoke("run", prompts, "--progress", "plain", "--report", "report.json")
    assert re.search(
        r"^\d+ of 10 rows, [\d,.]+ rows/s, [\d,]+ tokens/s, \d+% cached, 0 errors, 00:00 left$", done.stderr, re.M
    )
    report = json.loads(Path("report.json").read_text())
    assert (report["ended"], report["rows"], report["rows_with_errors"]) == ("complete", 10, 0)
    assert report["prompt_tokens"] == 20 and report["settings"]["inputs"] == [str(prompts)]
    done = invoke("run", prompts, "--progress", "none", "--fresh")
    assert "of 10 rows" not in done.stderr and "10/10" not in done.stderr


def test_a_report_of_a_job_that_stopped(
    invoke: Invoke, prompts: Path, fake_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "fail_at_step", 3)
    assert invoke("run", prompts, "--report", "report.json").exit_code == 2
    report = json.loads(Path("report.json").read_text())
    assert report["ended"] == "stopped" and 0 < report["rows"] < 10
    done = invoke("run", prompts, "--max-errors", "0", "-o", "out.jsonl", "--chat", "--report", "report.json")
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("none/report.json", "the folder none does not exist"),
        ("prompts.jsonl", "is a file of this job"),
        ("out.csv", "is a file of this job"),
        ("out.csv.manifest.json", "is a file of this job"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_first(
    invoke: Invoke, prompts: Path, fake_llm: Any, report: str, reason: str
) -> None:
    before = prompts.read_bytes()
    done = invoke("run", prompts.name, "-o", "out.csv", "--report", report)
    assert (done.exit_code, reason in done.stderr, "--report" in done.stderr) == (2, True, True)
    assert prompts.read_bytes() == before and not fake_llm.made


def test_ordered_and_repeated_rows_on_stdout(invoke: Invoke, fake_llm: Any) -> None:
    Path("in.jsonl").write_text("".join(f'{{"prompt": "p{index % 4}"}}\n' for index in range(20)))
    done = invoke("run", "in.jsonl", "-o", "-", "--ordered", "--dedup", "--progress", "none")
    assert done.exit_code == 0 and "rows     20, 0 with errors" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["text"] for row in rows] == [f"answer {index % 4}" for index in range(20)]
    assert len(fake_llm.made[0].prompts) == 4
