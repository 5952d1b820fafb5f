"""The other routes, and what happens to requests that are none."""

import json
import time
from typing import Any

import pytest

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


def test_tokens_there_and_back(client: Any) -> None:
    found = client.post("/tokenize", json={"prompt": "Name the capital of Chad."}).json()
    assert found["count"] == len(found["tokens"]) > 0
    assert found["max_model_len"] == 2048
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"text": "Name the capital of Chad."}
    assert client.post("/tokenize", json={"messages": QUESTION}).json()["count"] == 16
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_generate_in_sglangs_form(client: Any) -> None:
    body = {"text": "Once", "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
    answer = client.post("/generate", json={**body, "return_logprob": True, "top_logprobs_num": 2}).json()
    assert len(answer["output_ids"]) == 4
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert len(answer["meta_info"]["output_token_logprobs"]) == 4
    assert len(answer["meta_info"]["output_top_logprobs"][0]) == 2
    several = client.post("/generate", json={**body, "text": ["Once", "The"]}).json()
    assert several[0]["text"] == answer["text"]
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["text"] == answer["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "a", "input_ids": [1]}, "text"),
        ({}, "text"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "sampling_params": {"max_tokens": 4}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"text": "a", "top_logprobs_num": 3}, "top_logprobs_num"),
        ({"input_ids": [[]]}, "input_ids"),
    ],
)
def test_generate_refuses_by_name(client: Any, body: object, param: str) -> None:
    response = client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_health(client: Any) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/health_generate").json() == {"status": "ok"}
    assert client.get("/get_model_info").json()["max_context_length"] == 2048


def test_metrics_count_what_was_answered(client: Any) -> None:
    def values() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = values()
    body = {"model": "demo", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
    client.post("/v1/completions", json=body)
    after = values()
    assert after["minisgl:generation_tokens_total"] - before["minisgl:generation_tokens_total"] == 4
    assert after["minisgl:e2e_request_latency_seconds_count"] - before["minisgl:e2e_request_latency_seconds_count"] == 1
    assert after["minisgl:inter_token_latency_seconds_count"] - before["minisgl:inter_token_latency_seconds_count"] == 3
    assert after["minisgl:num_running_reqs"] == 0
    assert after["minisgl:max_total_num_tokens"] == 128 * 64


def test_the_cache_is_used_and_flushed(server: Any, client: Any) -> None:
    body = {"prompt": [7] * 200, "max_tokens": 1}

    def cached() -> int:
        usage = client.post("/v1/completions", json=body).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    cached()
    assert cached() >= 128
    assert client.post("/flush_cache").json() == {"success": True}
    assert cached() == 0


def test_the_page_needs_nothing_from_elsewhere(client: Any) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http" not in response.text.replace("http-equiv", "")
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"messages": "hi"}', 400),
        (b'{"messages": [{"role": "user", "content": {}}]}', 400),
        (b"[" * 100_000, 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "seed": 1' + b"0" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1e400}', 400),
    ],
)
def test_malformed_bodies_are_400(client: Any, content: bytes, status: int) -> None:
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_what_cannot_fit_is_refused_before_it_is_tokenised(client: Any) -> None:
    start = time.monotonic()
    for path, body in (
        ("/v1/completions", {"prompt": "word " * 2_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 2_000_000}]}),
        ("/v1/chat/completions", {"messages": QUESTION * 100_000}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded", response.text
    assert time.monotonic() - start < 10  # tokenised, they take half a minute


def test_a_grammar_that_cannot_be_followed_is_the_clients_mistake(client: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    rules = "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(40))
    form = {"type": "grammar", "grammar": f'start: a0\n{rules}\na40: "x"'}
    response = client.post("/v1/chat/completions", json={"messages": QUESTION, "response_format": form})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "structured_output_failed"


def test_errors_have_one_form(client: Any) -> None:
    for response, status in (
        (client.get("/nowhere"), 404),
        (client.get("/v1/chat/completions"), 405),
        (client.post("/v1/chat/completions", content="{}", headers={"content-type": "text/plain"}), 415),
        (client.get("/health", headers={"origin": "https://evil.example"}), 403),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_request_keeps_its_id(server: Any, client: Any) -> None:
    response = client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert len(client.get("/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]) == 24
