"""Rows with tools, thinking and a form of their answers, through the whole engine and into each kind of output."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from minisgl.batch_run.estimate import estimate
from minisgl.batch_run.job import Job, JobOptions
from minisgl.llm import LLM
from tests.test_chat import HELLO, TEMPLATE, WEATHER
from tests.tiny_models import make

pytest.importorskip("llguidance")

FORCED = {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required"}
CLOSED = {"enable_thinking": False}  # or the grammar waits for an end of thinking that this model never writes
LETTERS = {"messages": HELLO, "response_format": {"type": "regex", "regex": "[ab]{4}"}}
SAMPLING = {"temperature": 1.0, "seed": 1, "max_tokens": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make("qwen3", tmp_path_factory.mktemp("qwen3"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", dtype="float32", page_size=16, max_running=4, max_step_tokens=64) as llm:
        yield llm


@pytest.fixture
def answers(tmp_path: Path, folder: Path, llm: LLM) -> Any:
    """Answer rows as a job does; gives the path of its output."""

    def answer(rows: list[Any], name: str = "out.jsonl", **options: Any) -> Path:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = {"model": str(folder), "sampling": SAMPLING, "chat_template_kwargs": CLOSED} | options
        with Job(JobOptions([str(tmp_path / "in.jsonl")], str(tmp_path / name), **asked)) as job:
            if job.has_rows_left:
                job.answer(llm)
            job.finish()
        return tmp_path / name

    return answer


def lines(path: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row.get("index", 0))


def test_each_row_has_its_own(answers: Any) -> None:
    bad = {**LETTERS, "response_format": {"type": "regex", "regex": "["}}
    many = {**FORCED, "n": 2, "parallel_tool_calls": False}
    forced, letters, free, refused, twice = lines(answers([FORCED, LETTERS, {"messages": HELLO}, bad, many]))
    assert forced["text"] == "" and forced["finish_reason"] == "stop" and forced["error"] is None
    for call in forced["tool_calls"]:
        assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])["city"]
    assert set(letters["text"]) <= {"a", "b"} and len(letters["text"]) == 4
    assert "tool_calls" not in letters and "reasoning" not in letters and free["error"] is None
    assert "regex cannot be used" in refused["error"]["message"]
    assert [len(sample["tool_calls"]) for sample in twice["samples"]] == [1, 1]


def test_thinking_is_apart(answers: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "decode", lambda ids, skip=True: "<think>so</think>yes")
    [row] = lines(answers([{"messages": HELLO}], chat_template_kwargs=None))
    assert (row["reasoning"], row["text"]) == ("so", "yes")


def test_tables(answers: Any) -> None:
    rows = [LETTERS, FORCED]
    with answers(rows, "out.csv").open() as file:
        letters, forced = sorted(csv.DictReader(file), key=lambda row: row["index"])
    assert letters["tool_calls"] == "" and len(letters["text"]) == 4
    assert json.loads(forced["tool_calls"])[0]["function"]["name"] == "weather"
    table = sorted(pq.read_table(answers(rows, "out.parquet")).to_pylist(), key=lambda row: row["index"])
    assert table[0]["tool_calls"] is None and "weather" in table[1]["tool_calls"]


def test_equal_rows_are_asked_once_and_a_job_goes_on(answers: Any, llm: LLM) -> None:
    rows = [FORCED, {**FORCED, "id": "again"}, {**FORCED, "tool_choice": "auto"}, LETTERS]
    path = answers(rows, dedup=True)
    first, again, auto, _ = lines(path)
    assert first["tool_calls"] == again["tool_calls"] != auto.get("tool_calls"), "with the same ids"
    before = path.read_bytes()
    path.write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
    assert answers(rows, dedup=True) == path
    assert len(lines(path)) == 4 and path.read_bytes().startswith(b"".join(before.splitlines(keepends=True)[:2]))


def test_lines_of_openai(answers: Any) -> None:
    def line(url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": url, "method": "POST", "url": url, "body": {"model": "m", **body}}

    chat = line("/v1/chat/completions", **FORCED, logprobs=True, top_logprobs=2)
    text = line("/v1/completions", prompt=["the inn", [5, 6]], logprobs=1, prompt_logprobs=0, max_tokens=3)
    found = {row["custom_id"]: row["response"] for row in lines(answers([chat, text]))}
    [choice] = found["/v1/chat/completions"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["type"] == "function"
    tokens = choice["logprobs"]["content"]
    assert "weather" in "".join(token["token"] for token in tokens)
    assert {len(token["top_logprobs"]) for token in tokens} == {1, 2}, "where the grammar leaves but one, one"
    first, second = found["/v1/completions"]["body"]["choices"]
    assert len(first["logprobs"]["tokens"]) == 3 and len(first["logprobs"]["top_logprobs"][0]) == 1
    assert first["prompt_logprobs"][0] is None and len(second["prompt_logprobs"]) == 2


def test_a_dry_run_counts_tools(answers: Any, folder: Path, tmp_path: Path) -> None:
    def prompt_tokens(row: Any) -> int:
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        table = estimate(JobOptions([str(tmp_path / "in.jsonl")], model=str(folder), engine={"device": "cpu"}))
        return int(table.split("tokens")[1].split("prompt")[0].strip().replace(",", ""))

    assert prompt_tokens(FORCED) > prompt_tokens(LETTERS) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampling": {"response_format": {"type": "regex", "regex": "["}}}, "regex cannot be used"),
        ({"chat_template_kwargs": {"thinking": True}}, "does not read thinking"),
    ],
)
def test_flags_that_the_model_cannot_follow(tmp_path: Path, folder: Path, options: Any, says: str) -> None:
    (tmp_path / "in.txt").write_text("x\n")
    with Job(JobOptions([str(tmp_path / "in.txt")], model=str(folder), engine={"device": "cpu"}, **options)) as job:
        with pytest.raises(ValueError, match=says):
            job.load()
        assert job.has_rows_left and job.output.num_rows == 0
