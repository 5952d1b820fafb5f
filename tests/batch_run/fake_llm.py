"""A stand-in engine: answers a request after a few steps, with no model, so that the runner's own logic is tested."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from minisgl.chat import ChatFormat, ChatPrompt
from minisgl.errors import RequestError
from minisgl.llm import LLM
from minisgl.request import CHOICE_STRIDE, Request, Result, SamplingParams, Usage


class FakeTokenizer:
    has_chat_template = True
    chat_template = "<think><tool_call>"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(char) % 1000 for char in text] for text in texts]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def render(self, messages: list[dict[str, Any]], tools: Any = None, template_kwargs: Any = None) -> str:
        if not self.has_chat_template:
            raise RequestError("the model has no chat template")
        begun = "" if template_kwargs is None else json.dumps(template_kwargs)
        names = "".join(tool["function"]["name"] for tool in tools or ())
        return begun + names + "\1" + "".join(message["content"] for message in messages) + "\2"

    def encode_rendered(self, texts: list[str]) -> list[list[int]]:
        return self.encode_batch(texts)


class FakeLLM:
    """Runs `max_running` requests at a time; each ends after (its index % 3) + 1 steps and echoes its prompt."""

    made: list["FakeLLM"] = []
    fail_at_step: int | None = None
    failure: BaseException = RuntimeError("the device is gone\nsecond line")

    def __init__(self, model: Any = None, **options: Any):
        self.model, self.options = model, options
        self.config = SimpleNamespace(max_running=options.get("max_running", 8), dp=1, max_len=100)
        self.tokenizer: Any = FakeTokenizer()
        self.chat_format = ChatFormat(self.tokenizer)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.params: dict[int, SamplingParams] = {}
        self.prompts: dict[int, list[int]] = {}
        self.steps = self.peak = 0
        self.closed = False
        FakeLLM.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def new_request(self, prompt_ids: list[int], params: SamplingParams, *, index: int) -> Request:
        if len(prompt_ids) > 100:
            raise RequestError(f"prompt has {len(prompt_ids)} tokens; --max-len is 100", "prompt_too_long")
        if any(not 0 <= token < 1000 for token in prompt_ids):
            raise RequestError("a token id is outside the vocabulary of 1,000 ids", "invalid_token_id")
        self.params[index], self.prompts[index] = params, prompt_ids
        return Request(index, prompt_ids, params, 200, frozenset())

    def new_requests(
        self, prompt_ids: list[int], params: SamplingParams, *, index: int, thinks: bool = False
    ) -> list[Request]:
        indices = range(index, index + (params.n or 1) * CHOICE_STRIDE, CHOICE_STRIDE)
        return [self.new_request(prompt_ids, params, index=place) for place in indices]

    def read_answer(self, answer: Result, chat: ChatPrompt) -> Result:
        return LLM.read_answer(self, answer, chat)  # type: ignore[arg-type]

    def check_params(self, params: SamplingParams) -> None:
        """All are good."""

    def submit(self, requests: list[Request]) -> None:
        self.waiting += requests[::-1]  # any order is allowed
        self.peak = max(self.peak, self.num_unfinished)

    def drop_waiting(self) -> list[Request]:
        dropped, self.waiting = self.waiting, []
        return dropped

    def step(self) -> list[tuple[Request, Result]]:
        self.steps += 1
        if self.steps == self.fail_at_step:
            raise self.failure
        while self.waiting and len(self.running) < self.config.max_running:
            self.running.append(self.waiting.pop(0))
        for request in self.running:
            request.append(7)
        ended = [request for request in self.running if request.num_output == request.index % 3 + 1]
        self.running = [request for request in self.running if request not in ended]
        return [(request, self.answer(request)) for request in ended]

    def answer(self, request: Request) -> Result:
        if request.params.stop == ("ENGINE",):
            usage = Usage(request.num_prompt, request.num_output, 1)
            return Result("half", request.output_ids, "error", usage, RequestError("does not fit any more"))
        return self.good_answer(request)

    def good_answer(self, request: Request) -> Result:
        usage = Usage(request.num_prompt, request.num_output, 1)
        return Result(f"answer {request.index}", request.output_ids, "stop", usage)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """The class FakeLLM, fresh for this test."""
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "fail_at_step", None)
    monkeypatch.setattr(FakeLLM, "failure", FakeLLM.failure)
    monkeypatch.setattr(FakeTokenizer, "has_chat_template", True)
    return FakeLLM
