"""`minisgl eval` on the stand-in engine, which answers row I with "answer I"."""

import json
from pathlib import Path

import pytest

from minisgl.cli.eval import default_folder, resolve
from minisgl.errors import MinisglError
from tests.cli.conftest import Invoke

FLAGS = ("--prompt-column", "q", "--extract", "number", "--match", "number", "--progress", "none")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five rows; the stand-in is right on the first four."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{row}", "answer": min(row, 3)}) + "\n" for row in range(5)))
    return path


@pytest.mark.parametrize("command", [["eval"], ["eval", "compare"]], ids=" ".join)
def test_help(invoke: Invoke, command: list[str]) -> None:
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    assert " ".join(["minisgl", *command]) in done.output.split("Examples:")[1]
    assert command != ["eval"] or ("gsm8k" in done.output and "--memory-fraction" in done.output)


def test_a_score_and_the_rows_behind_it(invoke: Invoke, data: Path) -> None:
    done = invoke("eval", data.name, *FLAGS)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split() == ["sums", "accuracy", "0.8000", "0.1789", "5", "0.0%", "0.0%"]
    assert "rows     5, 0 with errors" in done.stdout and "revision as it was, seed 0" in done.stdout
    samples = [json.loads(line) for line in Path("sums.eval/samples.jsonl").read_text().splitlines()]
    assert samples[4] == {
        "id": 4,
        "index": 4,
        "prompt": "q4",
        "output": "answer 4",
        "answer": "4",
        "target": 3,
        "verdict": "wrong",
        "scores": {"accuracy": 0.0},
        "finish_reason": "stop",
        "error": None,
    }
    assert json.loads(Path("sums.eval/results.json").read_text())["metrics"][0]["value"] == 0.8


def test_rows_with_errors_are_counted_and_shown(invoke: Invoke, data: Path) -> None:
    data.write_text(data.read_text() + "no JSON\n")
    done = invoke("eval", data.name, *FLAGS)
    assert done.exit_code == 1
    assert (
        "0.6667" in done.stdout
        and "rows     6, 1 with errors, which count as wrong. First: row 5: not JSON" in done.stdout
    )


def test_groups_beyond_the_table(invoke: Invoke, data: Path) -> None:
    data.write_text("".join(json.dumps({"q": "q", "answer": 1, "g": row}) + "\n" for row in range(40)))
    done = invoke("eval", data.name, *FLAGS, "--group", "g")
    assert "... and 11 more in results.json" in done.stdout


def test_a_task_of_ones_own(invoke: Invoke, data: Path) -> None:
    Path("mine.yaml").write_text(f"{{data: {data.name}, prompt_column: q, extract: number, match: number}}")
    assert "mine  accuracy  0.8000" in invoke("eval", "mine.yaml", "--progress", "none").stdout
    assert Path("mine.eval/results.json").exists()
    other = data.with_name("other.jsonl")
    other.write_text('{"q": "q", "answer": 0}\n')
    assert "mine  accuracy  1.0000" in invoke("eval", "mine.yaml", other.name, "-o", "o", "--progress", "none").stdout
    Path("none.yaml").write_text("mode: generate")
    assert "none.yaml names no data" in invoke("eval", "none.yaml").stderr


def test_programs_that_nobody_allowed(invoke: Invoke, data: Path) -> None:
    data.write_text('{"prompt": "p", "answer": ["", ""]}\n')
    done = invoke("eval", data.name, "--extract", "code", "--match", "python", "--progress", "none")
    assert done.exit_code == 0
    assert "not run" in done.stdout and "1 programs were not run: --allow-code runs them, with limits" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a task, a YAML file or data; the tasks are: arc, demo, gsm8k"),
        (["gsm9k"], "there is no task and no file 'gsm9k'; the tasks are: arc, demo, gsm8k"),
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["missing.yaml"], "missing.yaml does not exist"),
        (["sums.jsonl", "--prompt-column", "x"], "--prompt-column names 'x'; the columns are: q, answer"),
        (["sums.jsonl", "--prompt-column", "q", "--target", "x"], "--target names 'x'; the columns are: q, answer"),
        (["sums.jsonl", "--split", "test"], "--split is for data sets"),
        (["demo", "--split", "test"], "the demo questions have no splits"),
        (["sums.jsonl", "--extract", "words"], "extract is 'words'"),
        (["sums.jsonl", "--mode", "choice"], "mode choice needs options"),
        (["sums.jsonl", "-o", "no/such/folder"], "the folder no/such does not exist"),
        (["sums.jsonl", "-o", "sums.jsonl"], "is a file; name a folder"),
        (["demo", "--harness", "arc_easy"], "leave WHAT out"),
        (
            ["--harness", "arc_easy", "--temperature", "1"],
            "its tasks decide on that themselves: leave --temperature out",
        ),
        (["--harness", "arc_easy", "--target", "x"], "leave --target out"),
        (["--harness", "humaneval", "--allow-code"], "leave --allow-code out"),
        (["--harness", "arc_easy", "--url", "http://127.0.0.1:9"], "--harness needs the model here"),
        (["demo", "--url", "127.0.0.1:9"], "it must begin with http:// or https://"),
        (["demo", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["demo", "--url", "http://127.0.0.1:9", "--dtype", "float16"], "leave --dtype out"),
        (["demo", "--concurrency", "3"], "--concurrency is for a server"),
        (["compare", "sums.eval", "other.eval"], "does not exist; name the folder of a `minisgl eval`"),
    ],
)
def test_bad_input_is_one_line(invoke: Invoke, data: Path, args: list[str], message: str) -> None:
    done = invoke("eval", *args)
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(data.parent.glob("*.eval"))


def test_compare(invoke: Invoke, data: Path) -> None:
    invoke("eval", data.name, *FLAGS, "-o", "a")
    invoke("eval", data.name, "--prompt-column", "q", "--extract", "regex:[34]", "--match", "number", "-o", "b")
    done = invoke("eval", "compare", "a", "b", "--flips", "1", "--json", "report.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split()[:4] == ["accuracy", "0.8000", "0.2000", "-0.6000"]
    assert "McNemar exact" in done.stdout
    assert "right only in A: 3\n  0: '0' -> None, target 0\n" in done.stdout
    assert len(json.loads(Path("report.json").read_text())["lost"]) == 3


def test_a_known_data_set_is_asked_as_its_task_says(capsys: pytest.CaptureFixture[str]) -> None:
    task, inputs = resolve(["hf:openai/gsm8k:main"], {"split": "train", "few_shot": 0})
    assert (task.name, task.split, task.few_shot, task.extract) == ("gsm8k", "train", 0, "number")
    assert inputs == ["hf:openai/gsm8k:main"]
    assert "Using the task gsm8k" in capsys.readouterr().err
    with pytest.raises(MinisglError, match="there is no task"):
        resolve(["gsm"], {})


def test_where_results_go() -> None:
    names = ["demo", "tasks/mine.yaml", "data/sums.jsonl.gz", "hf:openai/gsm8k:main"]
    assert [default_folder([name]) for name in names] == [
        "demo.eval",
        "tasks/mine.eval",
        "data/sums.eval",
        "gsm8k-main.eval",
    ]
