"""Clients that leave, an engine that dies, a server that is told to end; keys and limits."""

import json
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from minisgl.demo import MODEL_PATH

from .conftest import RunningServer

pytestmark = pytest.mark.skipif(not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights")
LONG = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True}


def until(condition: Callable[[], bool], limit_s: float = 60) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + limit_s, "it never held"
        time.sleep(0.01)
    return time.monotonic() - start


@pytest.fixture
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of one test's own."""
    running: list[RunningServer] = []

    def start(*flags: str, **variables: str) -> RunningServer:
        running.append(RunningServer(*flags, **variables))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_request(server: RunningServer, stream: bool) -> None:
    def seconds_to_free() -> float:
        until(lambda: server.stats()["num_running_reqs"] == 0)
        with server.client() as client:
            if stream:
                with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                    lines = response.iter_lines()  # httpx closes the response with it
                    assert "choices" in next(lines)
                    assert server.stats()["num_running_reqs"] == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=LONG, timeout=0.5)
        return until(lambda: server.stats()["num_running_reqs"] == 0 and server.stats()["num_used_tokens"] == 0)

    # About 0.02 s where nothing else runs; other tests take their part of the cores.
    assert min(seconds_to_free() for _ in range(5)) < 0.1


def test_a_request_is_aborted_by_its_id(server: RunningServer) -> None:
    with server.client() as client, ThreadPoolExecutor(1) as threads:
        call = threads.submit(
            httpx.post, f"{server.url}/v1/completions", json=LONG, headers={"x-request-id": "long-1"}, timeout=60
        )
        until(lambda: server.stats()["num_running_reqs"] == 1)
        assert client.post("/abort_request", json={"rid": "other"}).json() == {"num_aborted": 0}
        assert client.post("/abort_request", json={"rid": "long-1"}).json() == {"num_aborted": 1}
        assert call.result().json()["choices"][0]["finish_reason"] == "abort"


def test_an_engine_that_is_killed_comes_back_and_everyone_is_answered(serve: Callable[..., RunningServer]) -> None:
    running = serve()
    first_pid = running.engine_pid
    with running.client() as client, ThreadPoolExecutor(4) as threads:
        whole = [threads.submit(client.post, "/v1/completions", json={**LONG, "max_tokens": 200}) for _ in range(2)]
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(first_pid, signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        down = until(lambda: client.get("/health").status_code == 503, 1)
        assert down < 0.5
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        # A stream that had begun ends with an error; what had not streamed is answered by the next engine.
        assert json.loads(events[-2])["error"]["type"] == "server_error"
        for call in whole:
            answer = call.result()
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 200
        assert client.get("/health").status_code == 200
    assert running.engine_pid != first_pid
    assert running.stats()["restarts"] == 1
    assert running.stop() == 0


def test_without_restart_waiting_clients_get_500(serve: Callable[..., RunningServer]) -> None:
    running = serve("--restart", "never")
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.post, "/v1/completions", json=LONG)
        until(lambda: running.stats()["num_running_reqs"] == 1)
        os.kill(running.engine_pid, signal.SIGKILL)
        answer = call.result()
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 503


def test_replicas_of_torchrun_answer_and_end_together(serve: Callable[..., RunningServer]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = serve("--dp", "2", "--device", "cpu", launcher=torchrun)
    body = {**LONG, "max_tokens": 8, "n": 4, "seed": 1}
    with running.client() as client:
        answer = client.post("/v1/completions", json=body).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
        assert running.stats()["max_total_num_tokens"] == 2 * 128 * 64
    ranks = _children(running.process.pid)
    everyone = [*ranks, *(child for rank in ranks for child in _children(rank))]
    everyone += [child for pid in everyone[2:] for child in _children(pid)]
    assert len(everyone) == 4, "the server, its engine process, and two replicas"
    os.kill(ranks[1], signal.SIGKILL)
    assert running.process.wait(30) != 0
    assert sum("Error: replica 1 is gone" in line for line in running.log) == 1
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in everyone))
    with pytest.raises(httpx.ConnectError), running.client() as client:
        client.get("/health")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_lets_running_requests_finish(serve: Callable[..., RunningServer]) -> None:
    running = serve()
    engine = running.engine_pid
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.post, "/v1/completions", json={**LONG, "max_tokens": 300})
        until(lambda: running.stats()["num_running_reqs"] == 1)
        assert running.stop() == 0
        assert call.result().json()["usage"]["completion_tokens"] == 300
    until(lambda: not Path(f"/proc/{engine}").exists())


def test_what_takes_longer_than_the_drain_is_aborted(serve: Callable[..., RunningServer]) -> None:
    running = serve("--drain-s", "0.3")
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.post, "/v1/completions", json={**LONG, "n": 8})
        until(lambda: running.stats()["num_running_reqs"] == 8)
        start = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - start < 20
        assert {choice["finish_reason"] for choice in call.result().json()["choices"]} == {"abort"}


def test_too_many_get_429_and_the_deadline_ends_the_rest(serve: Callable[..., RunningServer]) -> None:
    running = serve("--max-running", "1", "--max-queue", "1", "--deadline-s", "1.5")
    with running.client() as client, ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(client.post, "/v1/completions", json=LONG) for _ in range(2)]
        until(lambda: running.stats()["admitted"] == 2)
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert {call.result().status_code for call in calls} == {504}
        until(lambda: running.stats()["num_running_reqs"] == 0)
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def test_keys_and_sizes(serve: Callable[..., RunningServer]) -> None:
    running = serve(
        *("--max-body-mb", "2", "--max-file-mb", "1", "--log-format", "json", "--allow-origin", "https://good.example"),
        MINISGL_API_KEY="user-key",
        MINISGL_ADMIN_KEY="admin-key",
    )
    user, admin = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}
    with running.client() as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/models", headers=user).status_code == 200
        assert client.get("/v1/models", headers=admin).status_code == 401
        assert client.get("/metrics", headers=user).status_code == 401
        assert client.get("/metrics", headers=admin).status_code == 200
        assert client.get("/stats", auth=("anyone", "admin-key")).status_code == 200
        assert client.post("/flush_cache", headers=user).status_code == 401
        large = client.post("/v1/completions", headers=user, json={"prompt": "a" * (3 << 20)})
        assert large.status_code == 413
        for size, status in ((1 << 20, 200), (2 << 20, 413)):  # under the limit of other bodies
            file = {"data": {"purpose": "batch"}, "files": {"file": b"a" * size}}
            assert client.post("/v1/files", headers=user, **file).status_code == status
        assert client.get("/v1/files").status_code == client.get("/v1/batches").status_code == 401

        def chunks() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * (64 << 10)

        headers = {**user, "content-type": "application/json"}
        assert client.post("/v1/completions", headers=headers, content=chunks()).status_code == 413
        assert client.get("/health", headers={"x-long": "a" * 100_000}).status_code == 431
        good = {**user, "origin": "https://good.example"}
        assert client.get("/v1/models", headers=good).headers["access-control-allow-origin"] == good["origin"]
        assert client.get("/v1/models", headers={**user, "origin": "https://evil.example"}).status_code == 403
    assert running.stop() == 0
    lines = [json.loads(line) for line in running.log]
    assert {"request_id", "method", "path", "status", "seconds"} <= set(lines[0])
    assert "key" not in "".join(running.log)


def test_the_socket_is_private(server: RunningServer) -> None:
    sockets = [path for path in Path(tempfile.gettempdir()).glob("minisgl-*/engine-*") if path.owner()]
    assert sockets
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_embedding_that_is_aborted_is_503(server: RunningServer) -> None:
    body = {"input": [[5 + n] * 1900 for n in range(40)]}
    with server.client() as client, ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.post, "/v1/embeddings", json=body, headers={"x-request-id": "long-2"})
        until(lambda: httpx.post(f"{server.url}/abort_request", json={"rid": "long-2"}).json()["num_aborted"] > 0)
        refused = call.result()
    assert refused.status_code == 503 and refused.json()["error"]["message"] == "the request was aborted"
