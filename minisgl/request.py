"""What a caller asks for and gets back: SamplingParams, Request, Usage, Result.

Knows the life of one request on the host. Does not know tensors, scheduling policy or text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from minisgl.config import check_fields, option
from minisgl.errors import RequestError

if TYPE_CHECKING:
    from minisgl.parsers import ToolCall
    from minisgl.structured import Matcher

Pooling = Literal["last", "mean"]
FinishReason = Literal["stop", "length", "abort", "error"]
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 32
MAX_BANS = 2 * MAX_BAD_WORDS  # a word is spelt differently behind a space
MAX_BAN_TOKENS = 8
MAX_INT = 2**31 - 1  # of lengths and token ids, which are int32
MAX_BIASES = 512  # of `logit_bias`, and of the stop ids that `min_tokens` holds back
BIAS_RANGE = 100
HALF_PAIR = re.compile("[\ud800-\udfff]")  # json.loads joins pairs of surrogates, so what is left has no partner
NOT_OF_ENGINE = ("n", "stop", "bad_words", "echo", "truncate_prompt_tokens", "response_format")
CHOICE_STRIDE = 1 << 40  # between the indices of the requests for one prompt's answers: no job has so many prompts


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None means: the model's generation_config.json, then the default named
    here.

    Logits are edited in this order: logit_bias, min_tokens and bad_words, repetition_penalty, frequency_penalty and
    presence_penalty (as in vLLM), the grammar of response_format. Tokens are drawn by temperature, top_k, top_p, min_p
    (as in transformers); temperature 0 is greedy. Logprobs are those of the edited logits at temperature 1.
    """

    max_tokens: int | None = option(None, "Most tokens to generate. [default: 1024]", low=1, high=MAX_INT)
    min_tokens: int | None = option(None, "No stop before as many tokens. [default: 0]", low=0, high=MAX_INT)
    temperature: float | None = option(None, "0 is greedy. [default: the model's, or 1]", low=0, high=100)
    top_p: float | None = option(
        None, "Keep the likeliest tokens that sum to this. [default: the model's, or 1]", low=0, high=1
    )
    top_k: int | None = option(
        None, "Keep the k likeliest tokens; 0 or -1 keeps all. [default: the model's, or 0]", low=-1, high=MAX_INT
    )
    min_p: float | None = option(
        None, "Drop tokens less likely than this share of the likeliest. [default: the model's, or 0]", low=0, high=1
    )
    repetition_penalty: float | None = option(
        None, "Above 1, tokens of the text so far become less likely. [default: the model's, or 1]", low=0.01, high=100
    )
    presence_penalty: float | None = option(
        None, "Taken from the logit of each token that the answer has. [default: 0]", low=-2, high=2
    )
    frequency_penalty: float | None = option(
        None, "Taken from a token's logit each time the answer has it. [default: 0]", low=-2, high=2
    )
    seed: int | None = option(
        None, "Same seed, same text. [default: drawn from the engine's seed]", low=0, high=2**63 - 1
    )
    n: int | None = option(None, "Answers to one prompt. [default: 1]", low=1, high=128, flag="")
    ignore_eos: bool | None = option(None, "Go on after an end-of-text token. [default: false]")
    include_stop_str: bool | None = option(None, "Leave the stop string in the text. [default: false]")
    skip_special_tokens: bool | None = option(
        None,
        "Leave special tokens out of the text. [default: true]",
        flag="--skip-special-tokens/--show-special-tokens",
    )
    logprobs: int | None = option(
        None, "Give each token's logprob and as many of the likeliest ones'. [default: none]", low=0, high=20
    )
    prompt_logprobs: int | None = option(
        None, "The same for each token of the prompt but the first. [default: none]", low=0, high=20
    )
    echo: bool | None = option(None, "Put the prompt before the answer's text. [default: false]")
    truncate_prompt_tokens: int | None = option(
        None, "Keep this many tokens of a longer prompt, the last ones. [default: none]", low=1, high=MAX_INT
    )
    stop: str | Sequence[str] = option((), "End the answer before this text.")
    stop_token_ids: Sequence[int] = option((), "End the answer with this token.", flag="--stop-token-id")
    bad_words: Sequence[str] = option((), "Never write this word, as the tokenizer spells it.", flag="--bad-word")
    logit_bias: Mapping[int, float] | None = None
    response_format: Any = None  # a structured.ResponseFormat, or OpenAI's object, of which it is made

    def __post_init__(self) -> None:
        check_fields(self, _wrong)
        object.__setattr__(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise _wrong("stop_token_ids must be a list of integers")
        _check_ids("stop_token_ids", ids)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias) or None)
        if self.response_format is not None:
            from minisgl.structured import ResponseFormat  # few requests have one

            if not isinstance(self.response_format, ResponseFormat):
                object.__setattr__(self, "response_format", ResponseFormat.from_openai(self.response_format))

    def of_choice(self, place: int) -> "SamplingParams":
        """Of one of the `n` answers to a prompt: their seeds differ."""
        return self if not place or self.seed is None else replace(self, seed=(self.seed + place) % 2**63)

    def for_engine(self) -> dict[str, Any]:
        """The fields that an engine reads and that are given; JSON can hold them. Of one prompt several answers are
        several requests, and text is not the engine's."""
        given = {name: value for name, value in vars(self).items() if value is not None and value != ()}
        return {name: value for name, value in given.items() if name not in NOT_OF_ENGINE}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every parameter a row may name."""
        return tuple(setting.name for setting in fields(cls))

    def merge(self, values: dict[str, Any]) -> "SamplingParams":
        """These parameters with `values` over them (None leaves one as it is); an unknown name is a RequestError."""
        unknown = sorted(values.keys() - self.__dataclass_fields__.keys())
        if unknown:
            raise _wrong(f"unknown parameter {unknown[0]!r}; known ones: {', '.join(self.names())}")
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def over(self, defaults: "SamplingParams", seed: int) -> "SamplingParams":
        """These parameters, with those of `defaults` and then `seed` where they leave one open. All were checked when
        they were made, and are not checked again: a job has many requests."""
        filled = object.__new__(type(self))
        own = {name: value for name, value in vars(self).items() if value is not None}
        vars(filled).update(vars(defaults) | own)
        if filled.seed is None:
            vars(filled)["seed"] = seed
        return filled


def _wrong(message: str) -> RequestError:
    return RequestError(message, "invalid_parameter")


def _strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise _wrong(f"{name} must be a non-empty string or a list of them")
    if len(strings) > most:
        raise _wrong(f"{name} has {len(strings)} strings; at most {most} are allowed")
    if any(map(HALF_PAIR.search, strings)):
        raise _wrong(f"{name} has half of a surrogate pair, which no text has")
    return tuple(strings)


def _check_ids(name: str, ids: Iterable[int]) -> None:
    """Whether the model has them is for the engine to say."""
    for token in ids:
        if not 0 <= token <= MAX_INT:
            raise RequestError(f"{name}: token id {token} must be from 0 to {MAX_INT}", "invalid_token_id")


def _biases(value: Any) -> dict[int, float]:
    """logit_bias with integer keys, which JSON writes as strings."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_BIASES:
        raise _wrong(f"logit_bias must be an object of at most {MAX_BIASES} token ids and biases")
    try:
        biases = {int(token): float(bias) for token, bias in value.items()}
    except (TypeError, ValueError, OverflowError):
        raise _wrong("logit_bias must map token ids to numbers") from None
    _check_ids("logit_bias", biases)
    for token, bias in biases.items():
        if not -BIAS_RANGE <= bias <= BIAS_RANGE:
            raise _wrong(f"logit_bias of {token} is {bias}; it must be from -{BIAS_RANGE} to {BIAS_RANGE}")
    return biases


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were found in the prefix cache and not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """The natural logprob of a token, and the likeliest tokens at its place with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """One answered request. `error` is None unless finish_reason is "error".

    logprobs: of each output token; prompt_logprobs: of each prompt token but the first; None where not asked for.
    choices: with n > 1 all the answers, of which this one is the first.
    reasoning, tool_calls: of an answer to a conversation, whose text is without them.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    error: RequestError | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    choices: tuple["Result", ...] = ()
    reasoning: str = ""
    tool_calls: "tuple[ToolCall, ...]" = ()


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: natural logprobs, their sum first. is_greedy: each token is the likeliest."""

    logprob: float
    token_logprobs: list[float]
    is_greedy: bool
    num_tokens: int
    num_prompt_tokens: int = 0  # of both together
    cached_tokens: int = 0
    error: RequestError | None = None


@dataclass(frozen=True)
class Embedding:
    """The vector of a text  # [hidden] fp32; `error` is None unless there is none."""

    vector: npt.NDArray[np.float32]
    num_tokens: int = 0
    error: RequestError | None = None


class Request:
    """A request inside the engine: its tokens, and where the scheduler has it.

    tokens  # int32 [max_total]: prompt, then output, `num_tokens` known; the KV of the first `length` is stored, or
    will be by the step in flight.
    scored_from: the first prompt token whose logprob is asked for; None: none is. target: an id behind the prompt that
    is scored too, but not computed. pooling: the embedding that is asked for. bans: sequences of token ids that the
    output may not have. matcher: the grammar that the output follows.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: npt.ArrayLike,
        params: SamplingParams,
        max_total: int,
        eos_ids: frozenset[int],
        *,
        scored_from: int | None = None,
        target: int | None = None,
        pooling: Pooling | None = None,
        bans: Sequence[Sequence[int]] = (),
        matcher: "Matcher | None" = None,
    ):
        self.index = index
        self.params = params
        prompt = np.asarray(prompt_ids, np.int32)
        self.num_prompt = len(prompt)
        self.max_total = max_total
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self.pooling = pooling
        self.hidden_sum: npt.NDArray[np.float32] | None = None  # [hidden], of the first `num_pooled` tokens
        self.num_pooled = 0
        self.bans = bans
        self.matcher = matcher
        biases = {token: (bias, 0) for token, bias in (params.logit_bias or {}).items()}
        if params.min_tokens:
            may_stop = self.num_prompt + params.min_tokens
            biases |= {token: (biases.get(token, (0.0, 0))[0], may_stop) for token in self.stop_ids}
        self.biases: dict[int, tuple[float, int]] = biases  # what is added to an id's logit, and from which place on
        self.edits_logits = bool(
            biases
            or bans
            or params.presence_penalty
            or params.frequency_penalty
            or (params.repetition_penalty or 1) != 1
        )
        self.filters = bool(
            (params.top_k or 0) > 0 or (1 if params.top_p is None else params.top_p) < 1 or params.min_p
        )
        self.scored_from = scored_from
        self.tokens = np.empty(max_total, np.int32)
        self.tokens[: self.num_prompt] = prompt
        self.scored_end = self.num_prompt
        if target is not None:
            self.tokens[self.num_prompt] = target  # until a sampled token takes its place
            self.scored_end += 1
        self.num_tokens = self.num_prompt

        # The scheduler's:
        self.row: int | None = None
        self.pages: list[int] = []
        self.num_pending = 0  # tokens that steps in flight are sampling
        self.num_dropped = 0  # of these, those that will not count
        self.was_preempted = False
        self.cached_tokens = 0  # of the prompt, found in the prefix tree and not computed
        self.restart()

        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.retired = False  # it ended or was aborted: what steps in flight still sample for it is dropped

    def restart(self) -> None:
        """Nothing is computed: at first, and after a preemption."""
        self.length = 0
        self.num_shared = 0  # of the pages, the first that belong to the prefix tree
        self.decoding = False  # its last token was sampled in this row, and is the next input
        # Tokens whose pages may come from the prefix tree, and enter it while the request runs.
        self.num_shareable = self.max_total if self.scored_from is None else max(self.scored_from - 1, 0)
        if self.pooling == "mean":  # of all tokens
            self.num_shareable = 0

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def counts(self) -> bool:
        """Whether what steps in flight sample for it will be its next token."""
        return not self.retired and not self.num_dropped

    @property
    def next_scored(self) -> int | None:
        """The next prompt token whose logprob is to come; None: all that was asked for is there."""
        if self.scored_from is None or self.scored_from + len(self.prompt_logprobs) >= self.scored_end:
            return None
        return self.scored_from + len(self.prompt_logprobs)

    @property
    def num_matchable(self) -> int:
        """Known tokens that may come from the prefix cache: a token whose successor is scored must be computed."""
        needs_all = self.next_scored is not None or self.pooling == "mean"
        return min(self.num_tokens, self.num_shareable) if needs_all else self.num_tokens

    @property
    def output_ids(self) -> list[int]:
        ids: list[int] = self.tokens[self.num_prompt : self.num_tokens].tolist()
        return ids

    def embedding(self, normalize: bool) -> npt.NDArray[np.float32]:
        """The pooled hidden state  # [hidden] fp32, of length 1 if normalised."""
        assert self.hidden_sum is not None and self.num_pooled == self.num_prompt
        vector = self.hidden_sum / (self.num_prompt if self.pooling == "mean" else 1)
        return (vector / max(float(np.linalg.norm(vector)), 1e-12) if normalize else vector).astype(np.float32)

    def fail(self, error: RequestError) -> None:
        """End with an error."""
        self.error, self.finish_reason = error, "error"

    def append(self, token: int) -> None:
        """Add a sampled token and see whether the request ends with it; it fails with -1, which is none."""
        if token < 0:
            message = (
                f"the model has no next token after {self.num_tokens} tokens: its logits are NaN, -inf or all banned; "
                "where weights or activations overflow in float16, bfloat16 (--dtype) has room"
            )
            self.fail(RequestError(message, "no_finite_logits"))
            return
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_total:
            self.finish_reason = "length"
