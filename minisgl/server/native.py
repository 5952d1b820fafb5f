"""/generate in SGLang's own form.

    https://docs.sglang.ai/basic_usage/native_api.html

    {"text" | "input_ids", "sampling_params", "stream", "rid",
     "return_logprob", "logprob_start_len", "top_logprobs_num"}
    -> {"text", "output_ids", "meta_info"}, or a list of them for a list of prompts or for n > 1

Knows that form and the pieces of text. Does not know HTTP.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from minisgl.openai.bodies import read_prompts
from minisgl.openai.fields import Fields
from minisgl.request import SamplingParams, TokenLogprobs
from minisgl.server.answering import Answering, Piece, joined
from minisgl.server.served import ServedModel

PARAMS = {
    name: name
    for name in ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "n", "stop")
    + ("repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "logit_bias")
} | {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str",
}
DEFAULTS = SamplingParams(max_tokens=128)  # SGLang's
NEUTRAL: dict[str, tuple[Any, ...]] = {"return_text_in_logprobs": (False, True)}


@dataclass(frozen=True)
class Asked:
    """A body, read. `is_list`: the answer is a list."""

    prompts: tuple[str | list[int], ...]
    params: SamplingParams
    is_list: bool
    stream: bool
    request_id: str  # "": not given


def read_generate(body: Any) -> Asked:
    """A body of /generate; FieldError names the key that is wrong."""
    fields = Fields(body)
    by_text, by_ids = fields.take_any("text"), fields.take_any("input_ids")
    if (by_text is None) == (by_ids is None):
        fields.refuse("text", "or input_ids must be given, and not both")
    name, value = ("text", by_text) if by_ids is None else ("input_ids", by_ids)
    prompts = read_prompts(Fields({name: value}), name)
    own = Fields(fields.take("sampling_params", dict, {}), "sampling_params.")
    params = own.take_params(PARAMS, DEFAULTS)
    own.end(neutral={"spaces_between_special_tokens": (True,)})
    num_top, start = fields.take("top_logprobs_num", int, 0), fields.take("logprob_start_len", int, -1)
    if start not in (-1, 0):
        fields.refuse("logprob_start_len", f"is {start}; it must be -1 (of the answer) or 0 (of the prompt too)")
    if fields.take("return_logprob", bool, False):
        try:
            params = replace(params, logprobs=num_top, prompt_logprobs=num_top if start == 0 else None)
        except ValueError:
            fields.refuse("top_logprobs_num", f"is {num_top}; it must be from 0 to 20")
    elif num_top or start == 0:
        fields.refuse("top_logprobs_num" if num_top else "logprob_start_len", "needs return_logprob: true")
    stream, request_id = fields.take("stream", bool, False), fields.take("rid", str, "")
    fields.end(neutral=NEUTRAL)
    several = isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))
    return Asked(prompts, params, several or (params.n or 1) > 1, stream, request_id)


class Native:
    """Answers in SGLang's form."""

    def __init__(self, answering: Answering, model: ServedModel) -> None:
        self._answering = answering
        self._model = model

    async def generate(self, asked: Asked, request_id: str) -> Any:
        """One answer or a list of them."""
        count = len(asked.prompts) * (asked.params.n or 1)
        found: list[Any] = [None] * count
        start = time.monotonic()
        with self._answering.admitted(count):
            prompts = await self._answering.encode(asked.prompts)
            async with aclosing(
                self._answering.answers(prompts, asked.params, request_id=request_id, whole=True)
            ) as answers:
                async for place, piece in answers:
                    found[place] = self._value(piece, asked.params, request_id, start)
        return found if asked.is_list else found[0]

    async def chunks(self, asked: Asked, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """What the answer is so far, again and again; of several, with the "index" of each."""
        count = len(asked.prompts) * (asked.params.n or 1)
        pieces: list[list[Piece]] = [[] for _ in range(count)]
        start = time.monotonic()
        with self._answering.admitted(count):
            prompts = await self._answering.encode(asked.prompts)
            async with aclosing(self._answering.answers(prompts, asked.params, request_id=request_id)) as answers:
                async for place, piece in answers:
                    so_far = joined([*pieces[place], piece])
                    pieces[place] = [so_far]
                    value = self._value(so_far, asked.params, request_id, start)
                    yield {**value, "index": place} if asked.is_list else value

    def _value(self, piece: Piece, params: SamplingParams, request_id: str, start: float) -> dict[str, Any]:
        meta: dict[str, Any] = {"id": request_id, "finish_reason": None, "completion_tokens": len(piece.token_ids)}
        meta |= {"prompt_tokens": piece.usage.prompt_tokens, "cached_tokens": piece.usage.cached_tokens}
        if piece.finish_reason:
            reason: dict[str, Any] = {"type": piece.finish_reason}
            if piece.finish_reason == "length":
                reason["length"] = len(piece.token_ids)
            elif piece.stop_token is not None:
                reason["matched"] = piece.stop_token
            meta["finish_reason"] = reason
            meta["e2e_latency"] = time.monotonic() - start
        if params.logprobs is not None:
            meta |= self._logprobs("output", piece.logprobs or [], params.logprobs)
        if piece.prompt_logprobs is not None:
            meta |= self._logprobs("input", piece.prompt_logprobs, params.logprobs or 0)
        return {"text": piece.text, "output_ids": piece.token_ids, "meta_info": meta}

    def _logprobs(self, of: str, tokens: list[TokenLogprobs], num_top: int) -> dict[str, Any]:
        """(logprob, id, text) of each token, and of the likeliest ones at its place."""
        spell = self._model.spell
        found: dict[str, Any] = {
            f"{of}_token_logprobs": [(one.logprob, one.token_id, spell(one.token_id)) for one in tokens]
        }
        if num_top:
            found[f"{of}_top_logprobs"] = [[(value, id, spell(id)) for id, value in one.top] for one in tokens]
        return found
