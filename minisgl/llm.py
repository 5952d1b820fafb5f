"""The offline engine: prompts in, results out.

    with LLM("path/to/model") as llm:
        results = llm.generate(["Hello", "Good morning"], SamplingParams(temperature=0))

Knows the texts of answers: stop strings, streams. Requests are made by `TextRequests`; what runs when, and how, is
`Core`'s.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from tqdm import tqdm

from minisgl.chat import ChatPrompt
from minisgl.config import EngineConfig
from minisgl.core import open_core
from minisgl.errors import MinisglError, RequestError
from minisgl.messages import Messages
from minisgl.models.config import ModelConfig
from minisgl.models.generation import generation_defaults
from minisgl.output_text import Delta, OutputText
from minisgl.pairs import Prompt, check_ids, encode_pairs
from minisgl.request import Embedding, Pooling, Request, Result, SamplingParams, Score, Usage
from minisgl.text_requests import TextRequests
from minisgl.tokenizer import Tokenizer
from minisgl.weights import resolve_model

Params = SamplingParams | Sequence[SamplingParams] | None
Asked = tuple[Sequence[int], SamplingParams, ChatPrompt | None]  # token ids; of a conversation, how it was rendered


class LLM(TextRequests):
    """A model on one device or several. `model` is a folder, a Hugging Face id, or None for the demo model that ships
    with the package; options are the fields of `EngineConfig`.

    Raises MinisglError when the model, the device or an option cannot be used; its message says what to do.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        known = [setting.name for setting in fields(EngineConfig)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise MinisglError(f"unknown option {unknown[0]!r}; known ones: {', '.join(known)}")
        asked = EngineConfig(model=str(model or ""), **options)
        folder = resolve_model(asked.model)
        model_config, tokenizer = ModelConfig.from_folder(folder), Tokenizer.of_folder(folder)
        defaults = generation_defaults(folder, model_config, tokenizer.eos_id if tokenizer else None)
        self.core = open_core(asked, model_config, folder, defaults)
        super().__init__(self.core, tokenizer)
        # Requests whose text is made while they run: for stop strings, or for a stream.
        self._outputs: dict[Request, OutputText] = {}
        self._ended: list[tuple[Request, Result]] = []  # that no `step` has told yet

    @property
    def start_id(self) -> int:
        """The token that stands before a text that has nothing before it: the one that begins texts, or ends them."""
        ids = (self._tokenizer.bos_id, self._tokenizer.eos_id) if self._tokenizer else ()
        return next((token for token in (*ids, *sorted(self.core.eos_ids)) if token is not None), 0)

    # -- a whole job at once --

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, progress: bool = False
    ) -> list[Result]:
        """Complete one or many prompts (strings, or lists of token ids); the results are in the order of the prompts.

        `params` is one for all, or one each. A prompt that cannot be served gets a result whose `error` says why; the
        others are answered. `progress` shows a bar on stderr.
        """
        batch = _batch_of(prompts)
        asked: list[Asked | RequestError] = []
        for prompt, own in zip(batch, _one_each(params, len(batch)), strict=True):
            ids = _attempt(self._encode, prompt)
            asked.append(ids if isinstance(ids, RequestError) else (ids, own, None))
        return self._answer(asked, progress)

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: Params = None,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[Result]:
        """Answer one or many conversations, each a list of {"role": ..., "content": ...}, as `generate` does.

        Thinking and tool calls are in the results' `reasoning` and `tool_calls`, the rest is their text. `options` are
        those of `ChatFormat.prompt`: tools, tool_choice, and template_kwargs such as {"enable_thinking": False}.
        """
        if isinstance(conversations, str) or not isinstance(conversations, Sequence):
            raise MinisglError(
                f"conversations must be a list of messages or a list of these lists, not {conversations!r}; "
                "generate takes strings"
            )
        one = len(conversations) > 0 and isinstance(conversations[0], Mapping)
        batch = cast("Sequence[Messages]", [conversations] if one else conversations)
        chats = [
            _attempt(self.chat_format.prompt, messages, own, **options)
            for messages, own in zip(batch, _one_each(params, len(batch)), strict=True)
        ]
        rendered = iter(self.tokenizer.encode_rendered([one.text for one in chats if isinstance(one, ChatPrompt)]))
        asked = [one if isinstance(one, RequestError) else (next(rendered), one.params, one) for one in chats]
        return self._answer(asked, progress)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, progress: bool = False
    ) -> list[Score]:
        """The natural logprob of each continuation behind its prompt, in their order.

        Both are strings, or both lists of token ids. The tokens of strings are those of the joined text behind the
        prompt's; spaces at the prompt's end count to the continuation, as in lm-evaluation-harness. An empty prompt
        stands for the token that begins or ends texts. Prompts that share a prefix compute it once.
        """
        if not all(isinstance(given, Sequence) and not isinstance(given, str) for given in (prompts, continuations)):
            raise MinisglError("prompts and continuations must be two lists of the same length")
        if len(prompts) != len(continuations):
            raise MinisglError(f"there are {len(prompts)} prompts and {len(continuations)} continuations: give pairs")
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        pairs = encode_pairs(self, list(zip(prompts, continuations, strict=True)))
        made = [
            pair if isinstance(pair, RequestError) else _attempt(self._scored_request, index, *pair, params)
            for index, pair in enumerate(pairs)
        ]
        return [_score(result) for result in self._run(made, progress)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        progress: bool = False,
    ) -> list[Embedding]:
        """A vector of each prompt, in their order: the last layer's normed hidden state of the last token, or the mean
        over all tokens; of length 1 if normalised."""
        if pooling not in get_args(Pooling):
            raise MinisglError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
        params = SamplingParams(max_tokens=1, temperature=0)
        made = []
        for index, prompt in enumerate(_batch_of(prompts)):
            ids = _attempt(self._encode, prompt)
            failed = isinstance(ids, RequestError)
            made.append(ids if failed else _attempt(self.new_request, ids, params, index=index, pooling=pooling))
        results = self._run(made, progress)
        return [
            Embedding(np.zeros(0, np.float32), result.usage.prompt_tokens, result.error)
            if result.error
            else Embedding(one.embedding(normalize), result.usage.prompt_tokens)
            for one, result in zip(made, results, strict=True)
        ]

    def stream(
        self, prompt: Prompt | Messages, params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Delta]:
        """Answer one prompt or conversation piece by piece. Ending the iteration early aborts the request. Raises
        RequestError for a prompt that cannot be served.

        `options` are those of `chat`. The deltas have all of a conversation's text; the last one's result has thinking
        and tool calls apart.
        """
        [params] = _one_each(params, 1)
        if (params.n or 1) > 1:
            raise RequestError("a stream has one answer: leave n out, and make several streams")
        chat: ChatPrompt | None = None
        if isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            chat = self.chat_format.prompt(cast("Messages", prompt), params, **options)
            [ids], params = self.tokenizer.encode_rendered([chat.text]), chat.params
        elif options:
            raise MinisglError(f"{next(iter(options))} is for conversations; the prompt is none")
        else:
            ids = list(self._encode(cast("Prompt", prompt)))
        [request] = self.new_requests(ids, params, index=0, thinks=chat is not None and chat.thinks)
        self.submit([request], streamed=True)
        output = self._outputs[request]
        assert output.deltas is not None
        try:
            while True:
                while not output.deltas:
                    if request not in self._outputs:
                        raise MinisglError("the request was ended while its stream was read")
                    self._ended = self.step()
                delta = output.deltas.popleft()
                if delta.result is None:
                    yield delta
                    continue
                yield replace(delta, result=self.read_answer(delta.result, chat)) if chat else delta
                return
        finally:
            self.abort(request)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request uses."""
        self.core.reset_prefix_cache()

    def close(self) -> None:
        """Give the device's memory back. The LLM cannot be used afterwards."""
        self._outputs.clear()
        super().close()
        self.core.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- step by step: what a runner drives --

    @property
    def num_unfinished(self) -> int:
        """Requests that wait, or run, or have ended without that `step` has told."""
        return self.core.num_unfinished + len(self._ended)

    def submit(self, requests: list[Request], *, streamed: bool = False) -> None:
        """Queue a burst, ordered so that shared prefixes are neighbours."""
        self.core.submit(requests)
        for request in requests:
            if streamed or request.params.stop:
                self._outputs[request] = OutputText(request, self.tokenizer, streamed)

    def step(self) -> list[tuple[Request, Result]]:
        """Run a step of the engine; returns the requests that ended. Streamed ones are answered by their streams."""
        for request in self.core.step():
            output = self._outputs.get(request)
            if output and output.update() and request.finish_reason != "error":
                request.finish_reason = "stop"
                self.core.abort(request)  # no more than the first to end it counts
            if request.finish_reason:
                result = self._result(request)
                if output is None or output.deltas is None:
                    self._ended.append((request, result))
        ended, self._ended = self._ended, []
        return ended

    def abort(self, request: Request) -> None:
        """End a request now; its pages are free for others. It gets no result."""
        self._outputs.pop(request, None)
        self.core.abort(request)

    def drop_waiting(self) -> list[Request]:
        """Take back the requests that wait, and return them; those that run go on."""
        dropped = self.core.drop_waiting()
        for request in dropped:
            self._outputs.pop(request, None)
        return dropped

    # -- prompts and answers --

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else check_ids(prompt)

    def _scored_request(self, index: int, before: list[int], whole: list[int], params: SamplingParams) -> Request:
        """A request whose scores begin behind the ids of a prompt. The last one is scored, and need not be computed."""
        return self.new_request(whole[:-1], params, index=index, scored_from=len(before), target=whole[-1])

    def _answer(self, asked: Sequence[Asked | RequestError], progress: bool) -> list[Result]:
        made: list[Request | RequestError] = []
        counts = []
        for index, one in enumerate(asked):
            requests: list[Request] | RequestError
            if isinstance(one, RequestError):
                requests = one
            else:
                ids, params, chat = one
                thinks = chat is not None and chat.thinks
                requests = _attempt(self.new_requests, ids, params, index=index, thinks=thinks)
            choices = [requests] if isinstance(requests, RequestError) else requests
            made += choices
            counts.append(len(choices))
        results = iter(self._run(made, progress))
        answers = []
        for one, count in zip(asked, counts, strict=True):
            chat = None if isinstance(one, RequestError) else one[2]
            own = (next(results) for _ in range(count))
            first, *more = (self.read_answer(result, chat) if chat else result for result in own)
            answers.append(replace(first, choices=(first, *more)) if more else first)
        return answers

    def read_answer(self, answer: Result, chat: ChatPrompt) -> Result:
        """An answer to a conversation, with its thinking and tool calls apart."""
        return self.chat_format.apart(answer, chat)

    def _run(self, made: Sequence[Request | RequestError], progress: bool) -> list[Result]:
        """Answer requests to the end; the results are in their order."""
        results: dict[Request, Result] = {}
        requests = [request for request in made if isinstance(request, Request)]
        own, others = set(requests), []
        self.submit(requests)
        try:
            with tqdm(total=len(made), initial=len(made) - len(requests), unit="prompt", disable=not progress) as bar:
                while len(results) < len(requests):
                    for request, result in self.step():
                        if request in own:
                            results[request] = result
                            bar.update()
                        else:
                            others.append((request, result))
        finally:
            self._ended += others
            for request in requests:
                self.abort(request)
        return [results[one] if isinstance(one, Request) else Result("", [], "error", Usage(), one) for one in made]

    def _result(self, request: Request) -> Result:
        assert request.finish_reason is not None
        ids, params = request.output_ids, request.params
        skip = params.skip_special_tokens is not False
        output, rest = self._outputs.pop(request, None), ""
        if output:
            text, rest = output.finish()
            if output.stopped and request.finish_reason == "length":
                request.finish_reason = "stop"
        elif self._tokenizer:
            text = self._tokenizer.decode(ids[:-1] if ids and ids[-1] in request.stop_ids else ids, skip)
        else:
            text = ""
        if params.echo:
            text = self.tokenizer.decode(request.tokens[: request.num_prompt].tolist(), skip) + text
        usage = Usage(request.num_prompt, request.num_output, request.cached_tokens)
        result = Result(
            text,
            ids,
            request.finish_reason,
            usage,
            request.error,
            None if params.logprobs is None else request.logprobs,
            None if params.prompt_logprobs is None else request.prompt_logprobs,
        )
        if output and output.deltas is not None:
            output.deltas.append(Delta(rest, [], None, result))
        return result


def _batch_of(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if not isinstance(prompts, (Sequence, np.ndarray)):
        raise MinisglError(f"prompts must be a string, a list of token ids or a list of these, not {prompts!r}")
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
    return cast("Sequence[Prompt]", [prompts] if one else prompts)


def _one_each(params: Params, count: int) -> Sequence[SamplingParams]:
    """The parameters of each prompt. MinisglError when they are none, or not as many."""
    if isinstance(params, Sequence) and len(params) != count:
        raise MinisglError(f"there are {count} prompts and {len(params)} params: give one for all, or one each")
    each = params if isinstance(params, Sequence) else [params or SamplingParams()] * count
    for one in each:
        if not isinstance(one, SamplingParams):
            raise MinisglError(f"params must be SamplingParams, one for all prompts or one each, not {one!r}")
    return each


def _score(result: Result) -> Score:
    found = result.prompt_logprobs or []
    return Score(
        logprob=sum(one.logprob for one in found),
        token_logprobs=[one.logprob for one in found],
        is_greedy=bool(found) and not result.error and all(one.top[0][0] == one.token_id for one in found),
        num_tokens=len(found),
        num_prompt_tokens=result.usage.prompt_tokens + 1,
        cached_tokens=result.usage.cached_tokens,
        error=result.error,
    )


def _attempt(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The function's value, or the RequestError that it raised."""
    try:
        return function(*args, **options)
    except RequestError as error:
        return error
