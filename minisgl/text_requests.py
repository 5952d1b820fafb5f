"""Requests of texts: what a tokenizer, a chat template and grammars make of prompts and parameters.

Knows text and parameters. Does not know engines: a dry run makes requests that nobody answers.
"""

from collections.abc import Sequence
from functools import cached_property

from minisgl.bad_words import bans_of
from minisgl.chat import ChatFormat
from minisgl.core import RequestMaker
from minisgl.errors import MinisglError, RequestError
from minisgl.parsers.reasoning import END as END_OF_THINKING
from minisgl.request import CHOICE_STRIDE, Pooling, Request, SamplingParams
from minisgl.structured import GrammarCompiler, Matcher, ResponseFormat
from minisgl.tokenizer import Tokenizer


class TextRequests:
    """Makes requests for a model. tokenizer: None where the model's folder has none, which text then needs."""

    def __init__(self, maker: RequestMaker, tokenizer: Tokenizer | None) -> None:
        self.config, self.model_config = maker.config, maker.model_config
        self._maker, self._tokenizer = maker, tokenizer
        self._grammars: GrammarCompiler | None = None

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the model writes conversations."""
        return ChatFormat(self.tokenizer, self.config.reasoning_parser, self.config.tool_parser)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; MinisglError when its folder has none."""
        if self._tokenizer is None:
            raise MinisglError("the model's folder has no tokenizer: add tokenizer.json, or send and ask for token ids")
        return self._tokenizer

    def new_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int,
        scored_from: int | None = None,
        target: int | None = None,
        pooling: Pooling | None = None,
        thinks: bool = False,
    ) -> Request:
        """A request; RequestError says what is wrong with it. See `RequestMaker.new_request`. `thinks`: the answer
        begins with thinking, which response_format leaves free."""
        if self._tokenizer is None:
            needs = ("stop", "bad_words", "response_format", "echo")
            name = next((name for name in needs if getattr(params, name)), None)
            if name:
                raise RequestError(f"{name} needs a tokenizer, and the model's folder has none", "invalid_parameter")
        if params.truncate_prompt_tokens:
            prompt_ids = prompt_ids[-params.truncate_prompt_tokens :]
        bans = bans_of(self.tokenizer, params) if params.bad_words else []
        matcher = self._matcher(params.response_format, thinks) if params.response_format else None
        return self._maker.new_request(
            prompt_ids,
            params,
            index=index,
            scored_from=scored_from,
            target=target,
            pooling=pooling,
            bans=bans,
            matcher=matcher,
        )

    def check_params(self, params: SamplingParams) -> None:
        """RequestError for parameters that this model cannot follow, whatever the prompt."""
        self.new_request([0], params, index=0)

    def new_requests(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, index: int, thinks: bool = False
    ) -> list[Request]:
        """One request for each of the `n` answers; their seeds differ. See `new_request`."""
        requests = []
        for place in range(params.n or 1):
            own, own_index = params.of_choice(place), index + place * CHOICE_STRIDE
            requests.append(self.new_request(prompt_ids, own, index=own_index, thinks=thinks))
        return requests

    def close(self) -> None:
        """Nothing more is asked for."""
        if self._grammars:
            self._grammars.close()

    def _matcher(self, response_format: ResponseFormat, thinks: bool) -> Matcher:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.model_config.vocab_size, self._maker.eos_ids)
        [end, *more] = self.tokenizer.encode_rendered([END_OF_THINKING])[0] if thinks else [None]
        return self._grammars.compile(response_format).matcher(None if more else end)
