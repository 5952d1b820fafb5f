"""The model that a server offers: its names, and how its text is read.

Knows names and the tokenizer's chat template. Does not know the engine or HTTP.
"""

import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from minisgl.chat import ChatFormat
from minisgl.errors import RequestError
from minisgl.openai.errors import FieldError
from minisgl.parsers.reasoning import END as END_OF_THINKING
from minisgl.request import SamplingParams
from minisgl.tokenizer import Tokenizer

SPELLINGS_KEPT = 1 << 17


@dataclass(frozen=True, eq=False)
class ServedModel:
    """`path` is another name of it, as clients of other servers have it."""

    name: str
    path: str
    tokenizer: Tokenizer
    chat_format: ChatFormat
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def end_of_thinking(self) -> int | None:
        """The id of `</think>`; None when it is not one token."""
        ids = self.tokenizer.encode_rendered([END_OF_THINKING])[0]
        return ids[0] if len(ids) == 1 else None

    def check(self, name: str) -> None:
        """RequestError unless a body that names this model, or none, is meant for this one."""
        if name not in ("", self.name, self.path):
            raise FieldError(
                f"the model {name[:80]!r} is not served here; this server has {self.name!r}", "model", "model_not_found"
            )

    def spell(self, token: int) -> str:
        """The text of one token, special or not."""
        return _spell(self.tokenizer, token)

    def echo(self, prompt_ids: list[int], params: SamplingParams) -> str:
        """The text of a prompt that comes back before its answer; "" unless that is asked for."""
        kept = prompt_ids[-params.truncate_prompt_tokens :] if params.truncate_prompt_tokens else prompt_ids
        return self.tokenizer.decode(kept, params.skip_special_tokens is not False) if params.echo else ""

    def card(self, max_len: int | None) -> dict[str, object]:
        """Its entry in /v1/models."""
        card: dict[str, object] = {"id": self.name, "object": "model", "created": self.created, "owned_by": "minisgl"}
        return card | {"root": self.path, "parent": None, "max_model_len": max_len}

    def check_ids(self, ids: list[int], vocab_size: int) -> None:
        """RequestError when an id has no text."""
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise RequestError(
                    f"token id {token!r} is outside the vocabulary of {vocab_size:,} ids", "invalid_token_id"
                )


@lru_cache(SPELLINGS_KEPT)
def _spell(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], False)
