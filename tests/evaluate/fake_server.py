"""A stand-in for an OpenAI-compatible server: answers row I's "qI" with "answer I", and scores tokens by their ids."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BOS = 1
Answer = tuple[int, dict[str, Any]]


class FakeServer:
    """Runs in threads until `close`. asked: (path, body, headers) of each request. Tests replace `failing`, which gives
    an answer in place of the usual one, and take routes away."""

    def __init__(self, port: int = 0) -> None:
        self.models = ["small"]
        self.asked: list[tuple[str, Any, Any]] = []
        self.failing: Callable[[str, Any], Answer | None] = lambda path, body: None
        self.routes: dict[str, Callable[[Any], dict[str, Any]]] = {
            "/v1/models": lambda body: {"data": [{"id": name} for name in self.models]},
            "/v1/chat/completions": lambda body: self.choices(body, body["messages"][-1]["content"], "message"),
            "/v1/completions": self.complete,
            "/tokenize": self.tokenize,
            "/detokenize": lambda body: {"prompt": bytes(body["tokens"][1:]).decode()},
        }
        self.delay_s = 0.0
        self.num_running = self.peak = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.handle(self)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("content-length", 0))
        body = json.loads(request.rfile.read(length)) if length else None
        with self._lock:
            self.asked.append((request.path, body, request.headers))
            self.num_running += 1
            self.peak = max(self.peak, self.num_running)
        time.sleep(self.delay_s)
        route = self.routes.get(request.path)
        status, value = self.failing(request.path, body) or (
            (200, route(body)) if route else (404, {"detail": "Not Found"})
        )
        with self._lock:
            self.num_running -= 1
        data = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body, _ in self.asked if asked == path]

    # -- answers --

    def choices(self, body: Any, question: str, kind: str) -> dict[str, Any]:
        text = question.replace("q", "answer ")
        one = {"text": text} if kind == "text" else {"message": {"role": "assistant", "content": text}}
        choices = [{"index": place, "finish_reason": "stop", **one} for place in range(body.get("n", 1))]
        return {"choices": choices, "usage": {"prompt_tokens": len(question), "completion_tokens": 2}}

    def complete(self, body: Any) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self.choices(body, prompt, "text")
        scored = [{str(token): {"logprob": -token / 100}, "0": {"logprob": -0.5}} for token in prompt[1:]]
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": [None, *scored]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1}}

    def tokenize(self, body: Any) -> dict[str, Any]:
        text = body["prompt"] if "prompt" in body else "<" + body["messages"][-1]["content"] + ">"
        special = body.get("add_special_tokens", True)
        return {"tokens": [*([BOS] if special else []), *text.encode()], "max_model_len": 50}
