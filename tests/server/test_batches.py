"""Files and batches through OpenAI's own client, and what they survive."""

import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import RunningServer

openai = pytest.importorskip("openai", reason="needs the extra dev: pip install -e '.[dev]'")

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def client(server: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ai(server: RunningServer) -> Any:
    return client(server)


def line(custom_id: str, body: Any, url: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def upload(ai: Any, lines: list[Any], **options: Any) -> str:
    data = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    file_id: str = ai.files.create(file=("lines.jsonl", data.encode()), purpose="batch", **options).id
    return file_id


def batch_of(ai: Any, lines: list[Any], endpoint: str = CHAT, **options: Any) -> Any:
    return ai.batches.create(input_file_id=upload(ai, lines), endpoint=endpoint, completion_window="24h", **options)


def until(ai: Any, batch_id: str, done: Callable[[Any], bool] = lambda batch: batch.status in ENDED) -> Any:
    limit = time.monotonic() + 60
    while not done(batch := ai.batches.retrieve(batch_id)):
        assert time.monotonic() < limit, batch
        time.sleep(0.02)
    return batch


def rows(ai: Any, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in ai.files.content(file_id).text.splitlines()]


def test_files_come_and_go(ai: Any) -> None:
    file = ai.files.create(
        file=("../up.jsonl", b"{}\n"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.object, file.bytes, file.purpose, file.status) == ("file", 3, "batch", "processed")
    assert file.expires_at == file.created_at + 3600
    assert ai.files.retrieve(file.id) == file
    other = upload(ai, [])
    assert [each.id for each in ai.files.list(limit=1)][:2] == [other, file.id]  # the client follows the pages
    assert [each.id for each in ai.files.list(order="asc")][-2:] == [file.id, other]
    assert ai.files.content(file.id).content == b"{}\n"
    assert ai.files.delete(file.id).deleted
    for call in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


@pytest.mark.parametrize("id", ["file-" + "0" * 32, "..%2f..%2fetc%2fpasswd", "file-..%2flock", "file-" + "0" * 5000])
def test_an_id_is_no_path(server: RunningServer, id: str) -> None:
    with server.client() as http:
        for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"):
            assert http.get(path).status_code == 404


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "batch", "expires_after[seconds]": "5"}, "expires_after.seconds"),
        ({"purpose": "batch", "expires_after[seconds]": "x"}, "expires_after.seconds"),
        ({"purpose": "batch", "expires_after[anchor]": "now"}, "expires_after.anchor"),
        ({"purpose": "batch", "model": "m"}, "model"),
    ],
)
def test_an_upload_is_refused_by_name(server: RunningServer, form: dict[str, str], param: str) -> None:
    with server.client() as http:
        refused = http.post("/v1/files", data=form, files={"file": b"{}"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert http.post("/v1/files", data={"purpose": "batch"}).json()["error"]["param"] == "file"
        assert http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400


def test_a_batch_is_answered(ai: Any) -> None:
    lines = [
        line("sum", {"model": "demo", "messages": QUESTION, "temperature": 0, "logprobs": True}),
        "",
        line("several", {"messages": QUESTION, "temperature": 0, "n": 2}),
        line("bad", {"messages": QUESTION, "temperature": -1}),
        line("long", {"messages": [{"role": "user", "content": "a " * 9000}]}),
        line("streams", {"messages": QUESTION, "stream": True}),
    ]
    begun = batch_of(ai, lines, metadata={"job": "nightly"})
    assert begun.status == "validating" and begun.metadata == {"job": "nightly"}
    assert begun.expires_at == begun.created_at + 24 * 3600
    batch = until(ai, begun.id)
    assert batch.status == "completed", batch
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 2, 3)
    answered, failed = rows(ai, batch.output_file_id), rows(ai, batch.error_file_id)
    assert [row["custom_id"] for row in answered] == ["sum", "several"]
    assert [row["custom_id"] for row in failed] == ["bad", "long", "streams"]
    body = answered[0]["response"]["body"]
    assert answered[0]["response"]["status_code"] == 200 and answered[0]["error"] is None
    assert body["choices"][0]["message"]["content"] == "5" and body["model"] == "demo"
    assert body["choices"][0]["logprobs"]["content"][0]["token"] == "5"
    assert [choice["message"]["content"] for choice in answered[1]["response"]["body"]["choices"]] == ["5", "5"]
    assert {row["response"]["status_code"] for row in failed} == {400}
    assert failed[1]["error"]["code"] == "prompt_too_long"
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (32, 6)
    assert batch.id in [each.id for each in ai.batches.list(limit=1)]
    assert ai.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_completions_with_several_prompts_and_an_echo(ai: Any) -> None:
    body = {"prompt": ["Once", "The sum"], "max_tokens": 2, "echo": True, "ignore_eos": True}
    batch = until(ai, batch_of(ai, [line("a", body, COMPLETION)], COMPLETION).id)
    [row] = rows(ai, batch.output_file_id)
    assert batch.error_file_id is None
    assert [text[:4] for text in (choice["text"] for choice in row["response"]["body"]["choices"])] == ["Once", "The "]


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        ([line("a", {"messages": QUESTION}), "{nonsense"], "invalid_json_line", 2),
        ([line("a", {"messages": QUESTION}), line("a", {"messages": QUESTION})], "duplicate_custom_id", 2),
        ([line("a", {"prompt": "a"}, COMPLETION)], "mismatched_url", 1),
        ([line("a", {"messages": QUESTION, "model": "gpt-5"})], "model_not_found", 1),
        ([line("a", {"messages": QUESTION}, method="GET")], "invalid_method", 1),
        ([{"body": {}, "url": CHAT, "method": "POST"}], "invalid_custom_id", 1),
    ],
)
def test_a_file_that_is_no_batch_fails_and_says_where(ai: Any, lines: list[Any], code: str, number: int | None) -> None:
    batch = until(ai, batch_of(ai, lines).id)
    assert batch.status == "failed" and batch.failed_at
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"input_file_id": "file-" + "0" * 32}, "file_id"),
        ({"extra_body": {"priority": 1}}, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_a_batch_is_refused_by_name(ai: Any, options: dict[str, Any], param: str) -> None:
    asked = {"input_file_id": upload(ai, []), "endpoint": CHAT, "completion_window": "24h", **options}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        ai.batches.create(**asked)
    assert refused.value.param == param


def test_a_batch_is_cancelled_and_keeps_what_it_has(ai: Any, server: RunningServer) -> None:
    short = [line("short", {"prompt": "a", "max_tokens": 1}, COMPLETION)]
    long = [line(f"{n}", {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}, COMPLETION) for n in range(3)]
    begun = batch_of(ai, short + long, COMPLETION)
    running = until(ai, begun.id, lambda batch: batch.request_counts.completed == 1)
    ai.files.delete(running.input_file_id)  # the batch has its own
    assert ai.batches.cancel(begun.id).status == "cancelling"
    batch = until(ai, begun.id)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    assert [row["custom_id"] for row in rows(ai, batch.output_file_id)] == ["short"]
    with pytest.raises(openai.BadRequestError):
        ai.batches.cancel(begun.id)
    assert server.stats()["num_running_reqs"] == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    running: list[RunningServer] = []

    def start(*flags: str) -> RunningServer:
        running.append(RunningServer("--files-dir", str(tmp_path / "files"), *flags))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def test_a_batch_outlives_its_engine_and_its_server(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    body = {"prompt": "a", "max_tokens": 80, "ignore_eos": True, "temperature": 0}
    first = serve("--max-running", "4")
    ai = client(first)
    begun = batch_of(ai, [line(f"{n}", body, COMPLETION) for n in range(7)], COMPLETION)
    until(ai, begun.id, lambda batch: batch.request_counts.completed >= 1)
    assert first.stats()["num_running_reqs"] <= 2
    os.kill(first.engine_pid, signal.SIGKILL)
    until(ai, begun.id, lambda batch: batch.request_counts.completed >= 3)
    first.process.kill()  # no time to say goodbye
    first.process.wait()
    second = serve("--max-running", "4")
    ai = client(second)
    batch = until(ai, begun.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 7, 0)
    answered = rows(ai, batch.output_file_id)
    assert [row["custom_id"] for row in answered] == [f"{n}" for n in range(7)]
    assert len({row["response"]["body"]["choices"][0]["text"] for row in answered}) == 1
    for folder in ("files", "files/files", "files/batches"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
    assert [path.suffix for path in (tmp_path / "files" / "batches").iterdir()] == [".json"]
