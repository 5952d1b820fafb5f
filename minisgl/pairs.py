"""Prompts and their continuations become token ids, for loglikelihoods: split as in lm-evaluation-harness.

Knows what encodes texts. Does not know engines or servers.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import numpy as np

from minisgl.errors import RequestError

Prompt = str | Sequence[int]
Pair = tuple[Prompt, Prompt]  # prompt, continuation
PairIds = tuple[list[int], list[int]]  # ids of the prompt, ids of both


class Encoder(Protocol):
    """Texts to ids, with and without the special tokens that a model expects around prompts."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]: ...


class TextModel(Protocol):
    """What pairs are encoded for. start_id: the token that stands before a text without a prompt."""

    @property
    def tokenizer(self) -> Encoder: ...

    @property
    def start_id(self) -> int: ...


def encode_pairs(model: TextModel, pairs: Sequence[Pair]) -> list[PairIds | RequestError]:
    """The ids of each pair, or what is wrong with it.

    The tokens of strings are those of the joined text behind the prompt's; spaces at the prompt's end count to the
    continuation. Token ids are joined as they are.
    """
    both = [pair for pair in pairs if isinstance(pair[0], str) and isinstance(pair[1], str)]
    texts = [text for one, other in cast("list[tuple[str, str]]", both) for text in (one.rstrip(), one + other)]
    try:
        encoded = iter(model.tokenizer.encode_batch(texts) if texts else [])
    except RequestError as error:  # of one of them
        return [error] if len(pairs) == 1 else [one for pair in pairs for one in encode_pairs(model, [pair])]
    return [_encode(model, pair, encoded) for pair in pairs]


def check_ids(prompt: Prompt) -> Sequence[int]:
    """Token ids; RequestError for what is neither text nor a list of them."""
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise RequestError(f"a prompt must be a string or a list of token ids, not {prompt!r}", "invalid_prompt")
    return cast("Sequence[int]", prompt)


def _encode(model: TextModel, pair: Pair, encoded: Iterator[list[int]]) -> PairIds | RequestError:
    """A pair's ids; those of texts are the next two of `encoded`."""
    prompt, continuation = pair
    try:
        if isinstance(prompt, str) and isinstance(continuation, str):
            before, whole = next(encoded), next(encoded)
            if not prompt.rstrip():
                before, whole = [], model.tokenizer.encode_rendered([prompt + continuation])[0]
        elif isinstance(prompt, str) or isinstance(continuation, str):
            raise RequestError("a prompt and its continuation must both be strings, or both token ids")
        else:
            before = list(check_ids(prompt))
            whole = before + list(check_ids(continuation))
        if not before:
            before, whole = [model.start_id], [model.start_id, *whole]
    except RequestError as error:
        return error
    if len(whole) <= len(before):
        message = "the continuation adds no tokens to the prompt's: make it longer, or send both as token ids"
        return RequestError(message, "invalid_prompt")
    return before, whole
