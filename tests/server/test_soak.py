"""All sorts of requests at once: some are read, some are left in the middle, some are aborted, some are nonsense. In
the end nothing is left of them. MINISGL_SOAK says how many; 2,000 take about three minutes on two cores."""

import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from .conftest import RunningServer

NUM_REQUESTS = int(os.environ.get("MINISGL_SOAK", "150"))
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
NONSENSE = (b"", b"{", b"null", b'{"messages": 5}', b"\xff", b"[" * 5000, b'{"prompt": "a", "temperature": -1}')


def leave(client: httpx.Client, rng: random.Random) -> int:
    """Ask for a long stream and go away after some of it."""
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": rng.randint(1, 3)}
    with client.stream("POST", "/v1/completions", json=body) as response:
        for _, _ in zip(range(rng.randint(0, 9)), response.iter_lines(), strict=False):
            pass
        return response.status_code


def hang_up(client: httpx.Client, rng: random.Random) -> int:
    """Go away before there is an answer."""
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True}
    try:
        return client.post("/v1/completions", json=body, timeout=rng.uniform(0.01, 0.4)).status_code
    except httpx.TimeoutException:
        return 200


def abort(client: httpx.Client, rng: random.Random) -> int:
    """Abort another one's request, or all."""
    body = {"abort_all": True} if rng.random() < 0.1 else {"rid": f"soak-{rng.randrange(NUM_REQUESTS)}"}
    return client.post("/abort_request", json=body).status_code


def nonsense(client: httpx.Client, rng: random.Random) -> int:
    path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/v1/batches"])
    headers = {"content-type": "application/json"}
    status = client.post(path, content=rng.choice(NONSENSE), headers=headers).status_code
    return 400 if status == 400 else 1000 + status


def whole(client: httpx.Client, rng: random.Random) -> int:
    number = rng.randrange(NUM_REQUESTS)
    prompt = f"Question {rng.randrange(5)} of a few that share a beginning: what is"
    path, body = rng.choice(
        [
            ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 20}),
            ("/v1/completions", {"prompt": [prompt, prompt + " it"], "n": 2, "max_tokens": 12, "logprobs": 1}),
            ("/v1/completions", {"prompt": prompt, "max_tokens": 60, "stop": ["e"], "seed": 1}),
            ("/v1/responses", {"input": "What is 2 + 3?", "max_output_tokens": 9}),
            ("/v1/embeddings", {"input": ["a", "b"]}),
            ("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 9}}),
            ("/tokenize", {"prompt": prompt}),
        ]
    )
    return client.post(path, json=body, headers={"x-request-id": f"soak-{number}"}).status_code


def batch(client: httpx.Client, rng: random.Random) -> int:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": json.dumps(line).encode()}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    begun = client.post("/v1/batches", json=asked).json()
    if rng.random() < 0.5:
        client.post(f"/v1/batches/{begun['id']}/cancel")
    return client.get(f"/v1/batches/{begun['id']}").status_code


KINDS = [leave, hang_up, abort, nonsense, batch] + 6 * [whole]


def test_nothing_is_left_of_a_mixed_load(server: RunningServer) -> None:
    def ask(number: int) -> tuple[str, int]:
        rng = random.Random(number)
        kind = rng.choice(KINDS)
        with server.client() as client:
            return kind.__name__, kind(client, rng)

    with ThreadPoolExecutor(12) as threads:
        found = Counter(threads.map(ask, range(NUM_REQUESTS)))
    assert {status for _, status in found} <= {200, 400, 429, 503}, found  # 503: an embedding that was aborted
    assert {kind for kind, _ in found} == {kind.__name__ for kind in KINDS}

    def is_idle(stats: dict[str, Any]) -> bool:
        names = ("admitted", "num_running_reqs", "num_queue_reqs", "num_used_tokens")
        return all(stats[name] == 0 for name in names)

    limit = time.monotonic() + 30
    while not is_idle(server.stats()):
        assert time.monotonic() < limit, server.stats()
        time.sleep(0.1)
    with server.client() as client:
        assert client.post("/flush_cache").status_code == 200
        assert client.get("/health_generate").status_code == 200
        client.post("/flush_cache")
    while server.stats()["cached_usage"]:  # every page is free again
        assert time.monotonic() < limit, server.stats()
        time.sleep(0.1)
    assert server.stats()["restarts"] == 0
    assert not any("Traceback" in line for line in server.log), "".join(server.log)
