"""What a caller asks for and gets back: SamplingParams, Request, Usage, Result.

Knows the life of one request on the host. Does not know tensors, scheduling policy or text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minisgl.config import check_fields, option
from minisgl.errors import RequestError

FinishReason = Literal["stop", "length", "error"]
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None means: the model's generation_config.json, then the default named
    here.

    Sampling order: temperature, top_k, top_p, min_p (as in transformers). temperature 0 is greedy.
    """

    max_tokens: int | None = option(None, "Most tokens to generate. [default: 1024]", low=1)
    temperature: float | None = option(None, "0 is greedy. [default: the model's, or 1]", low=0, high=100)
    top_p: float | None = option(
        None, "Keep the likeliest tokens that sum to this. [default: the model's, or 1]", low=0, high=1
    )
    top_k: int | None = option(
        None, "Keep the k likeliest tokens; 0 or -1 keeps all. [default: the model's, or 0]", low=-1, high=2**31 - 1
    )
    min_p: float | None = option(
        None, "Drop tokens less likely than this share of the likeliest. [default: the model's, or 0]", low=0, high=1
    )
    seed: int | None = option(
        None, "Same seed, same text. [default: drawn from the engine's seed]", low=0, high=2**63 - 1
    )
    ignore_eos: bool | None = option(None, "Go on after an end-of-text token. [default: false]")
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError("stop must be a non-empty string or a list of them")
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise RequestError("stop_token_ids must be a list of integers")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every parameter a row may name."""
        return tuple(setting.name for setting in fields(cls))

    def merge(self, values: dict[str, Any]) -> "SamplingParams":
        """These parameters with `values` over them (None leaves one as it is); an unknown name is a RequestError."""
        unknown = sorted(set(values) - set(self.names()))
        if unknown:
            raise RequestError(f"unknown parameter {unknown[0]!r}; known ones: {', '.join(self.names())}")
        return replace(self, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were found in the prefix cache and not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """One answered request. `error` is None unless finish_reason is "error"."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    error: RequestError | None = None


class Request:
    """A request inside the engine: its tokens, and where the scheduler has it.

    tokens  # int32 [max_total]: prompt, then output, `num_tokens` known; the KV of the first `length` is stored, or
    will be by the step in flight.
    """

    def __init__(
        self, index: int, prompt_ids: npt.ArrayLike, params: SamplingParams, max_total: int, eos_ids: frozenset[int]
    ):
        self.index = index
        self.params = params
        prompt = np.asarray(prompt_ids, np.int32)
        self.num_prompt = len(prompt)
        self.max_total = max_total
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self.tokens = np.empty(max_total, np.int32)
        self.tokens[: self.num_prompt] = prompt
        self.num_tokens = self.num_prompt

        # The scheduler's:
        self.row: int | None = None
        self.pages: list[int] = []
        self.num_shared = 0  # of the pages, the first that belong to the prefix tree
        self.length = 0
        self.decoding = False  # its last token was sampled in this row, and is the next input
        self.num_pending = 0  # tokens that steps in flight are sampling
        self.was_preempted = False
        self.cached_tokens = 0  # of the prompt, found in the prefix tree and not computed

        self.finish_reason: FinishReason | None = None
        self.retired = False  # it ended or was aborted: what steps in flight still sample for it is dropped

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        ids: list[int] = self.tokens[self.num_prompt : self.num_tokens].tolist()
        return ids

    def append(self, token: int) -> None:
        """Add a sampled token and see whether the request ends with it."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_total:
            self.finish_reason = "length"
