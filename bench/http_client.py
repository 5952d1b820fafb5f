"""A server as `minisgl bench serve` sees it: requests go out at given moments, and what comes back gets its times.

Knows HTTP, OpenAI's /v1/completions as a stream, and clocks. Does not know what becomes of the times.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.bench.workloads import TEMPERATURE, Workload
from minisgl.client import Client, Refused
from minisgl.errors import MinisglError
from minisgl.messages import Message
from minisgl.openai.answers import read_usage
from minisgl.server.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

try:
    import aiohttp  # its parser is C: httpx's would be the bottleneck at tens of thousands of tokens a second
except ImportError as error:
    raise MinisglError("bench serve needs aiohttp: pip install 'minisgl[bench]', or pip install aiohttp") from error

CONNECT_S = 30.0
MAX_ERROR_CHARS = 300


@dataclass
class Timing:
    """What became of one request. Times are in seconds since the run began; `error` is "" when it was answered."""

    due_s: float
    sent_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)  # when each token came; those of one chunk came evenly
    end_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


class Server:
    """An OpenAI-compatible server. Its keys are in MINISGL_API_KEY and MINISGL_ADMIN_KEY.

    model: the name that it gives its model. engine: who says to own it. info: what /get_model_info says; {} elsewhere.
    """

    def __init__(self, url: str) -> None:
        """MinisglError when there is no server at `url`, or one of several models."""
        self._client = Client(url)
        self.url = self._client.url
        self.model = self._client.model(None)
        [card] = self._client.ask("/v1/models")["data"]
        self.engine: str = card.get("owned_by", "")
        try:
            self.info: dict[str, Any] = self._client.ask("/get_model_info")
        except Refused:
            self.info = {}

    def encode(self, text: str) -> list[int]:
        return self._tokenize({"prompt": text})

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenize({"messages": list(messages)})

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False when the server does not let us."""
        variable = ADMIN_KEY_VARIABLE if os.environ.get(ADMIN_KEY_VARIABLE) else API_KEY_VARIABLE
        try:
            Client(self.url, key_variable=variable).ask("/flush_cache", {})
        except MinisglError:
            return False
        return True

    async def run(self, work: Workload, due_s: Sequence[float], max_concurrency: int | None = None) -> list[Timing]:
        """Send each request at its moment, or when fewer than `max_concurrency` are on their way, if that is later."""
        places = asyncio.Semaphore(max_concurrency or len(due_s))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=_headers()) as session:
            start = time.perf_counter()

            async def one(prompt: list[int], output_len: int, due_s: float) -> Timing:
                timing = Timing(due_s)
                await asyncio.sleep(start + due_s - time.perf_counter())
                async with places:
                    timing.sent_s = time.perf_counter() - start
                    try:
                        await self._complete(session, self._body(prompt, output_len), start, timing)
                        if not timing.error and len(timing.tokens_s) != output_len:
                            timing.error = f"the answer has {len(timing.tokens_s):,} of {output_len:,} tokens"
                    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
                        timing.error = timing.error or f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
                    timing.end_s = time.perf_counter() - start
                return timing

            return await asyncio.gather(*(one(*each) for each in zip(*work, due_s, strict=True)))

    def _body(self, prompt: list[int], output_len: int) -> dict[str, Any]:
        sampling = {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}
        streaming = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        return {"model": self.model, "prompt": prompt, "max_tokens": output_len, **sampling, **streaming}

    async def _complete(
        self, session: aiohttp.ClientSession, body: dict[str, Any], start: float, timing: Timing
    ) -> None:
        async with session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                timing.error = f"status {response.status}: {await response.text()}"[:MAX_ERROR_CHARS]
                return
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if not data:
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise ValueError(event["error"]["message"])
                self._note(event, time.perf_counter() - start, timing)
        timing.error = "the stream ended early"

    def _note(self, event: dict[str, Any], now: float, timing: Timing) -> None:
        """A chunk came."""
        if not event.get("usage"):
            raise ValueError("the server does not know stream_options.continuous_usage_stats")
        usage = read_usage(event["usage"])
        timing.prompt_tokens, timing.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        num_new = usage.completion_tokens - len(timing.tokens_s)
        before = timing.tokens_s[-1] if timing.tokens_s else now
        timing.tokens_s += [before + (now - before) * place / num_new for place in range(1, num_new + 1)]

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        tokens: list[int] = self._client.ask("/tokenize", body)["tokens"]
        return tokens


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}
