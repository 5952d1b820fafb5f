"""/v1/responses and /v1/embeddings: a body that was read -> the values of its answer.

Knows these forms and the pieces of text. Does not know HTTP.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from minisgl.openai.bodies import Asked
from minisgl.openai.embeddings import AskedEmbeddings, embeddings_object
from minisgl.openai.responses import ResponseObject
from minisgl.request import SamplingParams, Usage
from minisgl.server.answering import Answering, Unavailable
from minisgl.server.completions import Completions
from minisgl.server.served import ServedModel


class Responses:
    """Responses, whole or as events; both are made of the same pieces."""

    def __init__(self, answering: Answering, model: ServedModel, completions: Completions) -> None:
        self._answering = answering
        self._model = model
        self._completions = completions

    async def respond(self, asked: Asked, request_id: str) -> dict[str, Any]:
        """A response."""
        events = self._events(asked, request_id, whole=True)
        async with aclosing(events):
            async for event in events:
                last = event
        response: dict[str, Any] = last["response"]
        return response

    def events(self, asked: Asked, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream; the last one has the whole response."""
        return self._events(asked, request_id, whole=False)

    async def _events(self, asked: Asked, request_id: str, *, whole: bool) -> AsyncGenerator[dict[str, Any], None]:
        response = ResponseObject(request_id, self._model.name, int(time.time()), asked)
        has_begun, usage, status = False, Usage(), "completed"
        with self._answering.admitted(1):
            prompt, ids = await self._completions.prepare_chat(asked)
            answer = self._completions.chat_answer(asked, prompt)
            pieces = self._completions.answers_to_chat(prompt, ids, request_id, whole=whole)
            async with aclosing(pieces):
                async for _, piece in pieces:
                    if not has_begun:
                        has_begun = True
                        for event in response.begin():
                            yield event
                    deltas = [answer.push(piece.text)]
                    if piece.finish_reason:
                        deltas.append(answer.finish())
                        usage, status = piece.usage, "completed" if piece.finish_reason == "stop" else "incomplete"
                    for delta in deltas:
                        if delta.get("content"):
                            yield response.text(delta["content"])
        message = answer.message
        for event in response.end(status, message["content"] or "", message.get("reasoning_content", ""), usage):
            yield event


async def embed(answering: Answering, model: ServedModel, asked: AskedEmbeddings, request_id: str) -> dict[str, Any]:
    """The list of embeddings."""
    vectors, usages = [b""] * len(asked.prompts), [Usage()] * len(asked.prompts)
    params = SamplingParams(max_tokens=1, temperature=0)
    with answering.admitted(len(asked.prompts)):
        prompts = await answering.encode(asked.prompts)
        pieces = answering.answers(
            prompts, params, request_id=request_id, whole=True, pooling=asked.pooling, operation="embeddings"
        )
        async with aclosing(pieces):
            async for place, piece in pieces:
                if piece.embedding is None:
                    raise Unavailable("the request was aborted", 1)
                vectors[place], usages[place] = piece.embedding, piece.usage
    num_tokens = sum(usage.prompt_tokens for usage in usages)
    return embeddings_object(model.name, vectors, num_tokens, as_base64=asked.as_base64)
