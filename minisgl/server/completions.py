"""/v1/completions and /v1/chat/completions: a body that was read -> the values of its answer, whole or in chunks.

Knows the forms of OpenAI and the pieces of text. Does not know HTTP.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from minisgl.chat import ChatPrompt
from minisgl.errors import RequestError
from minisgl.openai.answers import (
    ChatAnswer,
    chat_logprobs,
    completion,
    completion_logprobs,
    prompt_logprobs_object,
    usage_object,
)
from minisgl.openai.bodies import Asked
from minisgl.openai.errors import FieldError
from minisgl.request import SamplingParams, Usage
from minisgl.server.answering import Answering, Piece
from minisgl.server.served import ServedModel

KWARGS = "chat_template_kwargs"


class Completions:
    """Answers to bodies. The whole answer and its chunks are made of the same pieces."""

    def __init__(self, answering: Answering, model: ServedModel) -> None:
        self._answering = answering
        self._model = model

    # -- chat --

    async def chat(self, asked: Asked, request_id: str) -> dict[str, Any]:
        """A chat.completion."""
        n = asked.params.n or 1
        choices: list[Any] = [None] * n
        usages = [Usage()] * n
        with self._answering.admitted(n):
            prompt, ids = await self.prepare_chat(asked)
            async with aclosing(self.answers_to_chat(prompt, ids, request_id, whole=True)) as answers:
                async for place, piece in answers:
                    answer = self.chat_answer(asked, prompt)
                    answer.push(piece.text)
                    answer.finish()
                    assert piece.finish_reason
                    usages[place] = piece.usage
                    choices[place] = {
                        "index": place,
                        "message": answer.message,
                        "logprobs": self._chat_logprobs(prompt.params, piece),
                        "finish_reason": answer.finish_reason(piece.finish_reason),
                        **self._prompt_logprobs(piece),
                    }
        usage = usage_object(usages, n)
        return completion("chat.completion", f"chatcmpl-{request_id}", self._model.name, _now(), choices, usage)

    async def chat_chunks(self, asked: Asked, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """The chat.completion.chunks of a stream."""
        n, created = asked.params.n or 1, _now()

        def chunk(*choices: Any, usage: Any = None) -> dict[str, Any]:
            form, id = "chat.completion.chunk", f"chatcmpl-{request_id}"
            return completion(form, id, self._model.name, created, list(choices), usage)

        def choice(place: int, delta: Any, logprobs: Any = None, reason: str | None = None, **more: Any) -> Any:
            return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **more}

        usages = [Usage()] * n
        with self._answering.admitted(n):
            prompt, ids = await self.prepare_chat(asked)
            answers: list[ChatAnswer | None] = [None] * n
            async with aclosing(self.answers_to_chat(prompt, ids, request_id, whole=False)) as pieces:
                async for place, piece in pieces:
                    answer = answers[place]
                    if answer is None:
                        answer = answers[place] = self.chat_answer(asked, prompt)
                        yield chunk(choice(place, {"role": "assistant", "content": ""}))
                    delta, logprobs = answer.push(piece.text), self._chat_logprobs(prompt.params, piece)
                    usages[place] = piece.usage
                    so_far = usage_object([piece.usage]) if asked.usage_in_chunks else None
                    if delta or logprobs or so_far:
                        yield chunk(choice(place, delta or {"content": ""}, logprobs), usage=so_far)
                    if piece.finish_reason:
                        rest = answer.finish()
                        if rest:
                            yield chunk(choice(place, rest))
                        reason = answer.finish_reason(piece.finish_reason)
                        yield chunk(choice(place, {}, None, reason, **self._prompt_logprobs(piece)))
        if asked.include_usage:
            yield chunk(usage=usage_object(usages, n))

    async def prepare_chat(self, asked: Asked) -> tuple[ChatPrompt, list[int]]:
        """The prompt with the parameters that answer it, and its ids."""
        self._answering.check_chars(sum(len(message["content"]) for message in asked.messages), len(asked.messages))
        return await self._answering.in_thread(self._prepare_chat, asked)

    def _prepare_chat(self, asked: Asked) -> tuple[ChatPrompt, list[int]]:
        try:
            prompt = self._model.chat_format.prompt(asked.messages, asked.params, **asked.chat_options)
        except RequestError as error:
            params = {"tools": "tools", "response_format": "response_format", "chat template argument": KWARGS}
            named = [param for text, param in params.items() if text in str(error)]
            raise FieldError(str(error), (named or ["messages"])[0], error.type) from None
        return prompt, self._model.tokenizer.encode_rendered([prompt.text])[0]

    def chat_answer(self, asked: Asked, prompt: ChatPrompt) -> ChatAnswer:
        """What reads one answer's text."""
        goes_on = asked.chat_options["template_kwargs"].get("continue_final_message")
        begun = asked.messages[-1]["content"] if goes_on else ""
        reader = self._model.chat_format.reader(prompt)
        return ChatAnswer(reader, begun, separate_reasoning=asked.separate_reasoning)

    def answers_to_chat(
        self, prompt: ChatPrompt, ids: list[int], request_id: str, *, whole: bool, patient: bool = False
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of the answers to a conversation."""
        grammar_after = self._model.end_of_thinking if prompt.thinks else None
        return self._answering.answers(
            [ids],
            prompt.params,
            request_id=request_id,
            whole=whole,
            grammar_after=grammar_after,
            patient=patient,
            operation="chat",
        )

    def _chat_logprobs(self, params: SamplingParams, piece: Piece) -> Any:
        return chat_logprobs(piece.logprobs or (), self._model.spell) if params.logprobs is not None else None

    def _prompt_logprobs(self, piece: Piece) -> dict[str, Any]:
        if piece.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs_object(piece.prompt_logprobs, self._model.spell)}

    # -- completions --

    async def complete(self, asked: Asked, request_id: str) -> dict[str, Any]:
        """A text_completion."""
        n = asked.params.n or 1
        count = n * len(asked.prompts)
        choices: list[Any] = [None] * count
        usages = [Usage()] * count
        params = asked.params
        echoes_logprobs = params.echo and params.logprobs is not None
        if echoes_logprobs and params.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=params.logprobs)
        with self._answering.admitted(count):
            prompts = await self._answering.encode(asked.prompts)
            async with aclosing(self._answering.answers(prompts, params, request_id=request_id, whole=True)) as answers:
                async for place, piece in answers:
                    usages[place] = piece.usage
                    prompt = prompts[place // n]
                    echo = self._model.echo(prompt, params)
                    logprobs = None
                    if echoes_logprobs:
                        scored = [*(piece.prompt_logprobs or ()), *(piece.logprobs or ())]
                        logprobs = completion_logprobs(scored, self._model.spell, 0, prompt[0])
                    elif params.logprobs is not None:
                        logprobs = completion_logprobs(piece.logprobs or (), self._model.spell, len(echo))
                    choices[place] = {
                        "index": place,
                        "text": echo + piece.text,
                        "logprobs": logprobs,
                        "finish_reason": piece.finish_reason,
                        **(self._prompt_logprobs(piece) if asked.params.prompt_logprobs is not None else {}),
                    }
        usage = usage_object(usages, n)
        return completion("text_completion", f"cmpl-{request_id}", self._model.name, _now(), choices, usage)

    async def completion_chunks(self, asked: Asked, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """The text_completions of a stream."""
        n, created, params = asked.params.n or 1, _now(), asked.params
        if params.echo and params.logprobs is not None:
            raise FieldError("echo with logprobs cannot be streamed: leave one of them out", "echo")
        count = n * len(asked.prompts)

        def chunk(*choices: Any, usage: Any = None) -> dict[str, Any]:
            return completion("text_completion", f"cmpl-{request_id}", self._model.name, created, list(choices), usage)

        usages, offsets = [Usage()] * count, [-1] * count
        with self._answering.admitted(count):
            prompts = await self._answering.encode(asked.prompts)
            async with aclosing(self._answering.answers(prompts, params, request_id=request_id)) as pieces:
                async for place, piece in pieces:
                    text = piece.text
                    if offsets[place] < 0:
                        echo = self._model.echo(prompts[place // n], params)
                        text, offsets[place] = echo + text, len(echo)
                    logprobs = None
                    if params.logprobs is not None:
                        logprobs = completion_logprobs(piece.logprobs or (), self._model.spell, offsets[place])
                    usages[place] = piece.usage
                    so_far = usage_object([piece.usage]) if asked.usage_in_chunks else None
                    if text or logprobs or so_far or piece.finish_reason:
                        reason, more = piece.finish_reason, self._prompt_logprobs(piece)
                        own = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}
                        yield chunk(own, usage=so_far)
                    offsets[place] += len(piece.text)
        if asked.include_usage:
            yield chunk(usage=usage_object(usages, n))


def _now() -> int:
    return int(time.time())
