"""The runner's own logic, on an engine that is not there: rows are isolated, memory is bounded, nothing is lost."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minisgl import tokenizer
from minisgl.batch_run.answers import Line
from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.prompts import Leaders
from minisgl.batch_run.row_run import Summary
from minisgl.batch_run.rows import BadRow, Head, Record, Row
from minisgl.batch_run.runner import BatchRun
from minisgl.errors import MinisglError
from minisgl.request import CHOICE_STRIDE, SamplingParams


class Lines:
    """An output that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.by_index: dict[int, bytes] = {}

    def append(self, lines: list[Line]) -> None:
        self.lines += [line.data for line in lines]
        self.by_index |= {line.index: line.data for line in lines}

    def read(self, index: int) -> bytes:
        return self.by_index[index]


class Job:
    """A BatchRun whose lines are kept, with the engine at hand."""

    def __init__(self, llm: Any, **options: Any):
        self.llm = llm
        output: Any = Lines()
        self.lines: list[bytes] = output.lines
        self.run = BatchRun(llm, output, **options)

    def __call__(self, rows: Any) -> Summary:
        return self.run.run(rows)

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        parsed = [json.loads(line) for line in self.lines]
        assert len({row["index"] for row in parsed}) == len(parsed), "a row was written twice"
        return {row["index"]: row for row in parsed}


def rows_of(*values: Any, **options: Any) -> list[Row | BadRow]:
    parser = RowParser(SamplingParams(), **options)
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    return [parser.parse(Record(index, f"line {index + 1}", line)) for index, line in enumerate(lines)]


def row(index: int) -> Row:
    return Row(Head(index, 1, index), prompt="x")


def test_every_row_is_answered_once(fake_llm: Any) -> None:
    job = Job(fake_llm())
    summary = job(rows_of(*({"prompt": f"p{i}", "id": f"row {i}"} for i in range(50))))
    assert {index: (row["id"], row["text"]) for index, row in job.rows.items()} == {
        index: (f"row {index}", f"answer {index}") for index in range(50)
    }
    assert (summary.rows, summary.num_errors) == (50, 0)
    assert summary.prompt_tokens == 10 * 2 + 40 * 3
    assert summary.output_tokens == sum(index % 3 + 1 for index in range(50))
    assert summary.cached_tokens == 50


def test_a_bad_row_harms_no_other(fake_llm: Any) -> None:
    job = Job(fake_llm())
    summary = job(
        rows_of(
            {"prompt": "good"},
            b"nonsense",
            {"prompt": "x" * 101},
            {"prompt_token_ids": [1, 2000]},
            {"prompt": "x", "stop": "ENGINE"},
            {"prompt": "good", "id": "last"},
        )
    )
    errors = {index: row["error"] and row["error"]["type"] for index, row in job.rows.items()}
    assert errors == {
        0: None,
        1: "invalid_json",
        2: "prompt_too_long",
        3: "invalid_token_id",
        4: "invalid_request",
        5: None,
    }
    assert job.rows[4]["text"] == "half" and job.rows[4]["finish_reason"] == "error"
    assert (summary.rows, summary.num_errors) == (6, 4)
    assert summary.first_error.startswith("line 2: not JSON")


def test_only_bad_rows(fake_llm: Any) -> None:
    job = Job(fake_llm())
    assert job(rows_of(b"1", b"2", b"3")).num_errors == 3
    assert job.llm.steps == 0


def test_no_rows(fake_llm: Any) -> None:
    job = Job(fake_llm())
    assert job([]).rows == 0
    assert job.lines == []


def test_prompts_and_messages(fake_llm: Any) -> None:
    values = {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt_token_ids": [97]}
    expected: dict[Any, Any] = {None: [[97], [1, 97, 2], [97]], True: [[1, 97, 2], [1, 97, 2], [97]]}
    for chat, ids in expected.items():
        job = Job(fake_llm())
        job(rows_of(*values, chat=chat))
        assert [job.llm.prompts[index] for index in range(3)] == ids
    job = Job(fake_llm())
    job(rows_of(*values, chat=False))
    assert job.llm.prompts == {0: [97], 2: [97]}
    assert "--no-chat" in job.rows[1]["error"]["message"]


def test_several_prompts_in_a_line(fake_llm: Any) -> None:
    body = {"prompt": ["a", "bcd", [101]], "n": 2}
    lines = [{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}]
    lines.append({**lines[0], "body": {"prompt": ["a", "x" * 200]}})
    llm = fake_llm()
    output: Any = Lines()
    summary = BatchRun(llm, output).run(rows_of(*lines))
    asked = [[97], [97], [98, 99, 100], [98, 99, 100], [101], [101]]
    places = [place * CHOICE_STRIDE for place in range(6)]
    assert [llm.prompts[place] for place in places] == asked
    assert (summary.rows, summary.prompt_tokens, summary.errors) == (2, 1 + 3 + 1, {"prompt_too_long": 1})
    answer, refusal = (json.loads(output.by_index[index])["response"] for index in range(2))
    assert [choice["index"] for choice in answer["body"]["choices"]] == list(range(6))
    assert answer["body"]["usage"]["prompt_tokens"] == 1 + 3 + 1
    assert refusal["status_code"] == 400


def test_a_model_without_a_chat_template(fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_llm()
    monkeypatch.setattr(type(llm.tokenizer), "has_chat_template", False)
    job = Job(llm)
    job(rows_of({"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"}))
    assert "no chat template" in job.rows[0]["error"]["message"]
    assert job.rows[1]["error"] is None


def test_a_model_without_a_tokenizer(fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class IdsOnly(fake_llm):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            del self.tokenizer

        def __getattr__(self, name: str) -> Any:
            raise MinisglError("no tokenizer: add one")

    job = Job(IdsOnly())
    job(rows_of({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt_token_ids": [1]}))
    errors = [row["error"] for _, row in sorted(job.rows.items())]
    assert errors == 2 * [{"type": "no_tokenizer", "message": "no tokenizer: add one"}] + [None]


def test_a_text_far_longer_than_the_context_is_not_tokenized(fake_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_llm()
    monkeypatch.setattr(tokenizer, "MAX_CHARS_PER_TOKEN", 2)  # 200 characters for 100 tokens
    encoded: list[int] = []
    encode = llm.tokenizer.encode_batch
    llm.tokenizer.encode_batch = lambda texts: [encoded.extend(map(len, texts)), *encode(texts)][1:]
    llm.tokenizer.render = lambda messages: encoded.append(-1)
    job = Job(llm)
    half = {"role": "user", "content": "x" * 101}
    job(rows_of({"prompt": "x" * 50}, {"prompt": "x" * 200}, {"prompt": "x" * 201}, {"messages": [half, half]}))
    assert encoded == [50, 200]
    assert [job.rows[index]["error"]["type"] for index in (1, 2, 3)] == ["prompt_too_long"] * 3
    assert "202 characters" in job.rows[3]["error"]["message"] and job.rows[0]["error"] is None


def test_token_ids_only_when_asked_for(fake_llm: Any) -> None:
    for wanted in (False, True):
        job = Job(fake_llm(), return_token_ids=wanted)
        job(rows_of({"prompt": "a"}, b"bad"))
        assert all(("token_ids" in row) == wanted for row in job.rows.values())


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 1000])
def test_reading_ahead_is_bounded(fake_llm: Any, num_rows: int) -> None:
    job = Job(fake_llm(), max_inflight=32)
    ahead = []

    def rows() -> Iterator[Row | BadRow]:
        for index in range(num_rows):
            ahead.append(index + 1 - len(job.lines))
            yield row(index) if index % 5 else BadRow(Head(index, 1, index), row_of_error)

    row_of_error = rows_of(b"bad")[0].error  # type: ignore[union-attr]
    assert job(rows()).rows == num_rows == len(job.rows)
    assert max(ahead, default=0) <= 32
    assert job.llm.peak <= 32


def test_the_engine_never_runs_dry(fake_llm: Any) -> None:
    """Rows are refilled while others run: fewer steps than one window after another would take."""

    class SlowLLM(fake_llm):  # type: ignore[misc]
        def step(self) -> Any:
            time.sleep(0.002)  # a device's step leaves the feeder time
            return super().step()

    job = Job(SlowLLM(max_running=8), max_inflight=64)
    job(row(index) for index in range(320))
    assert job.llm.steps <= 320 * 2 / 8 + 8  # two steps a row, eight at once


def test_finished_rows_are_written_before_the_next_step(fake_llm: Any) -> None:
    written = []
    job = Job(fake_llm(), on_progress=lambda summary: written.append((summary.rows, len(job.lines))))
    job(row(index) for index in range(20))
    assert len(written) > 3
    assert all(rows == lines for rows, lines in written)


@pytest.mark.parametrize("failure", [RuntimeError("the device is gone"), KeyboardInterrupt()])
def test_what_is_finished_is_kept_when_the_engine_stops(fake_llm: Any, failure: BaseException) -> None:
    llm = fake_llm()
    llm.fail_at_step, llm.failure = 5, failure
    job = Job(llm)
    with pytest.raises(type(failure)):
        job(row(index) for index in range(100))
    assert 0 < job.run.summary.rows == len(job.rows) < 100


def test_samples_of_a_row(fake_llm: Any) -> None:
    job = Job(fake_llm(), n=3)
    job(rows_of({"prompt": "a"}, {"prompt": "b", "n": 1}, n=3))
    assert [sample["text"] for sample in job.rows[0]["samples"]] == [
        f"answer {sample * CHOICE_STRIDE}" for sample in range(3)
    ]
    assert job.llm.params[0].n == 3 and 2 * CHOICE_STRIDE in job.llm.params
    assert "samples" not in job.rows[1]


def test_rows_that_ask_the_same_are_answered_once(fake_llm: Any) -> None:
    values = [{"prompt": f"p{index % 4}", "id": f"row {index}", "label": index} for index in range(40)]
    job = Job(fake_llm(), leaders=Leaders(), max_inflight=8)
    assert job(rows_of(*values)).rows == 40
    assert len(job.llm.prompts) == 4
    for index in range(40):
        row = job.rows[index]
        assert (row["id"], row["label"]) == (f"row {index}", index)
        assert row["text"] == f"answer {index % 4}"
    assert len({row["key"] for row in job.rows.values()}) == 40


def test_a_repeated_row_that_failed(fake_llm: Any) -> None:
    job = Job(fake_llm(), leaders=Leaders())
    summary = job(rows_of(*[{"prompt": "x" * 101}] * 2, *[{"prompt": "x", "stop": "ENGINE"}] * 2))
    assert summary.num_errors == 4
    assert [job.rows[index]["error"]["type"] for index in range(4)] == ["prompt_too_long"] * 2 + ["invalid_request"] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_are_cut(fake_llm: Any, side: Any) -> None:
    job = Job(fake_llm(), on_long=f"truncate-{side}")
    text = "".join(chr(200 + index) for index in range(150))
    job(rows_of({"prompt": text, "max_tokens": 10}, {"prompt": "short", "max_tokens": 99}))
    ids = [200 + index for index in range(150)]
    assert job.llm.prompts[0] == (ids[-90:] if side == "left" else ids[:90])
    assert len(job.llm.prompts[1]) == 5


def test_a_prompt_is_not_cut_to_nothing(fake_llm: Any) -> None:
    job = Job(fake_llm(), on_long="truncate-left")
    job(rows_of({"prompt": "x" * 150, "max_tokens": 100}, {"prompt": "x", "max_tokens": 100}))
    error = job.rows[0]["error"]
    assert error["type"] == "prompt_too_long" and "max_tokens is 100" in error["message"]
    assert job.rows[1]["error"] is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_conversations_lose_text_and_keep_their_template(fake_llm: Any, side: Any) -> None:
    job = Job(fake_llm(), on_long=f"truncate-{side}")
    text = "".join(chr(200 + index) for index in range(150))
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": text}]
    job(rows_of({"messages": messages, "max_tokens": 10}))
    ids = job.llm.prompts[0]
    assert len(ids) == 90 and ids[:3] == [1, ord("B"), ord("e")] and ids[-1] == 2
    assert ids[3:-1] == ([349 - 85 + index for index in range(86)] if side == "left" else list(range(200, 286)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_of_many_messages_are_cut_too(fake_llm: Any, side: Any) -> None:
    job = Job(fake_llm(), on_long=f"truncate-{side}")
    summary = job(rows_of({"messages": [{"role": "user", "content": "x" * 20}] * 50, "max_tokens": 10}))
    assert not summary.num_errors and len(job.llm.prompts[0]) == 90


def test_a_run_that_is_stopped_finishes_what_runs(fake_llm: Any) -> None:
    llm = fake_llm(max_running=8)
    job = Job(llm, should_stop=lambda: llm.steps >= 5)
    summary = job(row(index) for index in range(100))
    assert summary.stopped and llm.num_unfinished == 0
    assert 0 < len(job.rows) < 40


def test_too_many_errors_end_the_run(fake_llm: Any) -> None:
    job = Job(fake_llm(), max_errors=3)
    with pytest.raises(MinisglError, match="4 rows failed, more than --max-errors 3"):
        job(rows_of(b"1", b"2", b"3", b"4"))
    assert len(job.rows) == 4
    Job(fake_llm(), max_errors=4)(rows_of(b"1", b"2", b"3", b"4"))


@pytest.mark.parametrize("num_rows", [0, 1, 70, 300])  # of bursts of 256
def test_what_reading_raises_ends_the_run_once_the_rows_before_it_are_answered(fake_llm: Any, num_rows: int) -> None:
    def rows() -> Iterator[Row | BadRow]:
        yield from map(row, range(num_rows))
        raise MinisglError("the file breaks off")

    job = Job(fake_llm(), max_inflight=1024)
    with pytest.raises(MinisglError, match="breaks off"):
        job(rows())
    assert sorted(job.rows) == list(range(num_rows))


def test_each_burst_is_handed_over_at_once(fake_llm: Any) -> None:
    """The engine orders what it gets together by shared prefixes: a quarter of what is in flight."""

    class Counting(fake_llm):  # type: ignore[misc]
        bursts: list[list[int]] = []

        def submit(self, requests: Any) -> None:
            self.bursts.append([request.index for request in requests])
            super().submit(requests)

    Job(Counting(), max_inflight=32)(row(index) for index in range(20))
    assert Counting.bursts == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
