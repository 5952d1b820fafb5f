"""What the API process and the engine process say to each other: msgpack over a unix socket, one message a frame.

Knows names and types alone.
"""

from typing import Any

import msgspec

from minisgl.errors import RequestError
from minisgl.request import FinishReason, Pooling, TokenLogprobs

MAX_MESSAGE_BYTES = 256 << 20  # a prompt of a million tokens takes 5 MB


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Anything that is sent."""


# -- to the engine --


class Begin(Message, frozen=True):
    """Load the model. `config`: fields of EngineConfig."""

    config: dict[str, Any]
    folder: str
    eos_id: int | None  # the tokenizer's


class Submit(Message, frozen=True):
    """Answer a prompt. `params`: fields of SamplingParams that are not None. `bans`: see Request. `response_format`:
    fields of ResponseFormat, in force from the start or from after the token `grammar_after`. `pooling`: of the
    embedding that is asked for."""

    id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    index: int
    bans: list[list[int]]
    response_format: dict[str, Any] | None = None
    grammar_after: int | None = None
    pooling: Pooling | None = None


class Abort(Message, frozen=True):
    """End a request now; nothing more comes of it. Ids of requests that ended are ignored."""

    id: int


class Flush(Message, frozen=True):
    """Forget every cached prefix that no running request uses."""


# -- from the engine --


class Ready(Message, frozen=True):
    """The model is loaded. `max_len` and `capacity`, that of the KV pages, are in tokens."""

    max_len: int
    vocab_size: int
    capacity: int
    page_size: int
    max_running: int
    dtype: str
    device: str


class CannotStart(Message, frozen=True):
    """Why the model cannot be loaded, in words for users."""

    reason: str


class Refused(Message, frozen=True):
    """A request that cannot be answered."""

    id: int
    reason: str
    error_type: str

    def error(self) -> RequestError:
        return RequestError(self.reason, self.error_type)


class Tokens(msgspec.Struct, array_like=True, frozen=True):
    """What a step adds to a request; more comes unless there is a finish_reason. `by_token`: the last token ended
    the request, and is not of the text. `cached_tokens`: of the prompt, found in the prefix cache.
    `prompt_logprobs` and `embedding` come with the last."""

    id: int
    token_ids: list[int]
    cached_tokens: int
    finish_reason: FinishReason | None = None
    by_token: bool = False
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: tuple[str, str] | None = None  # of a RequestError: its message and type
    embedding: bytes | None = None  # fp32, of length 1

    def then(self, later: "Tokens") -> "Tokens":
        """Both steps as one."""
        logprobs = None if later.logprobs is None else (self.logprobs or []) + later.logprobs
        cached_tokens = max(self.cached_tokens, later.cached_tokens)
        token_ids = self.token_ids + later.token_ids
        return msgspec.structs.replace(later, token_ids=token_ids, cached_tokens=cached_tokens, logprobs=logprobs)


class Stats(Message, frozen=True):
    """Requests by state, and the tokens that KV pages hold by who holds them."""

    running: int = 0
    waiting: int = 0
    capacity: int = 0
    free: int = 0
    cached: int = 0  # in the prefix tree, and read by no request
    preemptions: int = 0


class Stepped(Message, frozen=True):
    """The results of a step, and where the engine stands after it."""

    tokens: list[Tokens]
    stats: Stats


ToEngine = Begin | Submit | Abort | Flush
FromEngine = Ready | CannotStart | Refused | Stepped

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
