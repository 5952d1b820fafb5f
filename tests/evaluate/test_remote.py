"""Evaluations of a served model, on a stand-in server; tests/server has them on a real one."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minisgl import client
from minisgl.errors import MinisglError
from minisgl.evaluate import remote
from minisgl.evaluate.task import Task
from tests.evaluate.conftest import evaluate, read_samples, values
from tests.evaluate.fake_server import BOS, FakeServer

ROWS = [{"q": f"q{row}", "answer": row} for row in range(12)]
TEXT = Task(name="text", prompt_column="q", extract="number", match="number")
CHAT = Task(name="chat", prompt_column="q", chat=True, system="Be brief.", extract="number", match="number")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(client, "BACKOFF_S", 0.0)
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def data(write: Callable[..., str]) -> str:
    return write(ROWS)


@pytest.mark.parametrize(("task", "path"), [(TEXT, "/v1/completions"), (CHAT, "/v1/chat/completions")])
def test_text_is_asked_and_graded(
    served: FakeServer, data: str, tmp_path: Path, task: Task, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISGL_API_KEY", "secret")
    results = evaluate(task, data, tmp_path / "out", url=served.url + "/v1/", sampling={"top_p": 0.5, "stop": ["x"]})
    assert values(results) == {"accuracy": 1.0}
    assert (results["model"], results["model_revision"]) == ("small", f"served at {served.url}")
    assert results["tokens"] == 2 * len(ROWS)
    bodies = served.bodies(path)
    question = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q0"}]}
    greedy = {"temperature": 0.0, "max_tokens": 512, "top_p": 0.5, "stop": ["x"]}
    assert {"model": "small", **(question if task.chat else {"prompt": "q0"}), **greedy} in bodies
    assert len(bodies) == len(ROWS)
    assert {headers["authorization"] for _, _, headers in served.asked} == {"Bearer secret"}


def test_no_more_than_so_many_at_a_time(served: FakeServer, data: str, tmp_path: Path) -> None:
    served.delay_s = 0.02
    evaluate(TEXT, data, tmp_path / "out", url=served.url, concurrency=3)
    assert served.peak == 3


def test_a_busy_server_is_asked_again(served: FakeServer, data: str, tmp_path: Path) -> None:
    answers = iter([(429, {}), (503, {}), (500, {}), (502, {})])
    served.failing = lambda path, body: None if body is None else next(answers, None)
    assert values(evaluate(TEXT, data, tmp_path / "out", url=served.url)) == {"accuracy": 1.0}
    assert len(served.bodies("/v1/completions")) == len(ROWS) + 4


def test_rows_that_are_refused_are_counted_and_can_be_asked_again(
    served: FakeServer, data: str, tmp_path: Path
) -> None:
    def failing(path: str, body: Any) -> tuple[int, dict[str, Any]] | None:
        if body and body["prompt"] == "q3":
            return 400, {"error": {"message": "no threes"}}
        return (500, {"oops": 1}) if body and body["prompt"] == "q4" else None

    served.failing = failing
    results = evaluate(TEXT, data, tmp_path / "out", url=served.url)
    assert (results["rows"], results["rows_with_errors"]) == (12, 2)
    errors = [sample["error"] for sample in read_samples(tmp_path / "out")]
    assert errors[3] == {"type": "invalid_request", "message": "no threes"}
    assert errors[4] == {"type": "server_failed", "message": 'the server answered with status 500: {"oops": 1}'}
    served.failing = lambda path, body: None
    asked = len(served.asked)
    assert values(evaluate(TEXT, data, tmp_path / "out", url=served.url, retry_errors=True)) == {"accuracy": 1.0}
    assert [body["prompt"] for _, body, _ in served.asked[asked:] if body] in (["q3", "q4"], ["q4", "q3"])
    with pytest.raises(MinisglError, match="2 rows failed, more than --max-errors 1"):
        served.failing = failing
        evaluate(TEXT, data, tmp_path / "strict", url=served.url, max_errors=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "the server's answer is no completion"),
        ({"choices": [{"message": None}]}, "the server's answer is no completion"),
        ([], "the server's answer is no completion"),
        ({"choices": [{"text": "0", "finish_reason": "abort"}]}, "the server gave up on the answer"),
    ],
)
def test_an_answer_that_is_none_fails_its_row(
    served: FakeServer, data: str, tmp_path: Path, answer: Any, message: str
) -> None:
    served.failing = lambda path, body: (200, answer) if body and body["prompt"] == "q3" else None
    results = evaluate(TEXT, data, tmp_path / "out", url=served.url)
    assert results["rows_with_errors"] == 1 and message in results["first_error"]


def test_a_server_that_goes_away_ends_the_run_which_can_go_on(
    served: FakeServer, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRIES", 1)
    other = FakeServer()
    other.failing = lambda path, body: other.close() if body and body["prompt"] == "q6" else None
    with pytest.raises(MinisglError, match="does not answer"):
        evaluate(TEXT, data, tmp_path / "out", url=other.url, concurrency=1)
    done = len((tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert done == 7
    with pytest.raises(MinisglError, match="revision was .*, is "):
        evaluate(TEXT, data, tmp_path / "out", url=served.url)
    again = FakeServer(other.port)
    results = evaluate(TEXT, data, tmp_path / "out", url=again.url)
    again.close()
    assert values(results) == {"accuracy": 1.0} and results["rows_of_earlier_runs"] == done
    assert len(again.bodies("/v1/completions")) == len(ROWS) - done


def test_samples_have_seeds_of_their_own(served: FakeServer, data: str, tmp_path: Path) -> None:
    task = Task(prompt_column="q", chat=True, extract="number", match="number", n=3)
    for seed in (0, 0, 1):
        folder = tmp_path / f"{len(served.asked)}"
        results = evaluate(task, data, folder, url=served.url, sampling={"temperature": 0.8}, engine={"seed": seed})
        assert values(results) == {"pass@1": 1.0, "pass@2": 1.0, "pass@3": 1.0, "majority": 1.0}
    bodies = served.bodies("/v1/chat/completions")
    assert {body["n"] for body in bodies} == {3}
    seeds = [{body["seed"] for body in bodies[start : start + 12]} for start in (0, 12, 24)]
    assert len(seeds[0]) == 12 and seeds[0] == seeds[1] and seeds[0].isdisjoint(seeds[2])


def test_options_are_scored_by_the_logprobs_of_the_prompt(
    served: FakeServer, write: Callable[..., str], tmp_path: Path
) -> None:
    task = Task(mode="choice", prompt_column="q", options="options", separator=" ")
    rows = [
        {"q": "é", "options": ["!", "z"], "answer": 0},
        {"q": "", "options": ["!"], "answer": 0},
        {"q": "x" * 60, "options": ["!"], "answer": 0},
    ]
    too_long = (400, {"error": {"message": "too long"}})
    served.failing = lambda path, body: too_long if path == "/v1/completions" and len(body["prompt"]) > 50 else None
    results = evaluate(task, write(rows), tmp_path / "out", url=served.url)
    samples = read_samples(tmp_path / "out")
    assert samples[0]["logprobs"] == pytest.approx([-(32 + ord(option)) / 100 for option in "!z"])
    assert samples[1]["logprobs"] == pytest.approx([-(32 + ord("!")) / 100])
    assert samples[2]["error"]["message"] == "too long"
    assert values(results)["accuracy"] == 2 / 3
    assert {body["prompt"][0] for body in served.bodies("/v1/completions")} == {BOS}

    evaluate(
        Task(mode="choice", prompt_column="q", chat=True, options="['ab']", target="0"),
        write(rows[:1]),
        tmp_path / "chat",
        url=served.url,
    )
    assert served.bodies("/v1/completions")[-1]["prompt"] == [*"<é>ab".encode()]  # the template has all of the marks


def test_perplexity(served: FakeServer, write: Callable[..., str], tmp_path: Path) -> None:
    task = Task(mode="ppl", prompt_column="text")
    text = "ab" * 60  # more than the context of 50
    results = evaluate(task, write([{"text": text}]), tmp_path / "out", url=served.url)
    assert values(results)["token_perplexity"] == pytest.approx(math.exp((ord("a") + ord("b")) / 200))
    assert all(len(body["prompt"]) < 50 for body in served.bodies("/v1/completions"))

    served.routes["/tokenize"] = lambda body: {"tokens": [*body["prompt"].encode()], "max_model_len": 50}
    with pytest.raises(MinisglError, match="does not say which token begins a text"):
        evaluate(task, write([{"text": text}]), tmp_path / "no start", url=served.url)
    served.routes["/get_model_info"] = lambda body: {"bos_token_id": None, "eos_token_id": 7}
    assert values(evaluate(task, write([{"text": text}]), tmp_path / "eos", url=served.url)) == values(results)
    assert [7, *text.encode()[:48]] in [body["prompt"] for body in served.bodies("/v1/completions")]


@pytest.mark.parametrize("route", ["/tokenize", "/v1/completions"])
def test_a_server_that_cannot_score(served: FakeServer, data: str, tmp_path: Path, route: str) -> None:
    if route == "/tokenize":
        del served.routes[route]
    else:
        served.routes[route] = lambda body: served.choices(body, "q", "text")
    task = Task(mode="choice", prompt_column="q", options="['a', 'b']")
    with pytest.raises(
        MinisglError, match=r"needs /tokenize .* and prompt_logprobs in /v1/completions.*or use mode gen"
    ):
        evaluate(task, data, tmp_path / "out", url=served.url)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:1"}, "must begin with http"),
        ({"engine": {"max_running": 3}}, "leave --max-running out"),
        ({"model": "large"}, "does not serve 'large'; -m names one of: small"),
        ({"url": None, "concurrency": 2}, "--concurrency is for a server"),
    ],
)
def test_bad_input(served: FakeServer, data: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MinisglError, match=message):
        evaluate(TEXT, data, tmp_path / "out", **{"url": served.url, **options})


def test_several_models_and_keys(served: FakeServer, data: str, tmp_path: Path) -> None:
    served.models = ["small", "large"]
    with pytest.raises(MinisglError, match="name one with -m: small, large"):
        evaluate(TEXT, data, tmp_path / "out", url=served.url)
    assert evaluate(TEXT, data, tmp_path / "out", url=served.url, model="large")["model"] == "large"
    assert {body["model"] for body in served.bodies("/v1/completions")} == {"large"}
    del served.routes["/v1/models"]
    assert evaluate(TEXT, data, tmp_path / "no list", url=served.url, model="large")["rows"] == 12
    with pytest.raises(MinisglError, match="has no list of models .*: name one with -m"):
        evaluate(TEXT, data, tmp_path / "no list", url=served.url)
    served.failing = lambda path, body: (401, {})
    with pytest.raises(MinisglError, match="refuses the key: .*MINISGL_API_KEY"):
        evaluate(TEXT, data, tmp_path / "other", url=served.url)
    asked = len(served.asked)  # another way to grade asks nobody, where -m says which model it was
    assert evaluate(TEXT, data, tmp_path / "out", url=served.url, model="large")["rows"] == 12
    assert len(served.asked) == asked
