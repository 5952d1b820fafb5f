"""Prompts -> pieces of text: tokenising in threads, the engine, detokenising, stop strings, admission.

Knows tokenizer and engine. Does not know the forms of requests and answers, or HTTP.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from minisgl.bad_words import bans_of
from minisgl.detokenizer import Detokenizer
from minisgl.errors import RequestError
from minisgl.request import CHOICE_STRIDE, FinishReason, Pooling, SamplingParams, TokenLogprobs, Usage
from minisgl.server.engine_client import DeadlinePassed, EngineClient, EngineDied, Generation
from minisgl.server.metrics import Metrics
from minisgl.server.protocol import Tokens
from minisgl.server.traces import RequestSpan, Traces
from minisgl.tokenizer import Tokenizer, check_chars

Value = TypeVar("Value")

TOKENIZER_THREADS = 4
MAX_RETRY_AFTER_S = 60


class Unavailable(Exception):
    """No answer now; come back after `retry_after_s`. `overloaded`: because too many are being answered."""

    def __init__(self, reason: str, retry_after_s: int, *, overloaded: bool = False) -> None:
        super().__init__(reason)
        self.overloaded = overloaded
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):
    """The engine gave up on one request."""


@dataclass(frozen=True)
class Piece:
    """What an answer has got. The last piece has finish_reason, and the stop token if one ended it. `usage` is that of
    the answer up to here."""

    text: str
    token_ids: list[int]
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    stop_token: int | None = None
    embedding: bytes | None = None  # fp32


@dataclass(frozen=True)
class Question:
    """What one answer is asked for. `whole`: in one piece. `arrival` and `deadline` are by time.monotonic()."""

    prompt_ids: list[int]
    params: SamplingParams
    index: int
    bans: list[list[int]]
    grammar_after: int | None
    pooling: Pooling | None
    request_id: str
    whole: bool
    arrival: float
    deadline: float | None
    span: RequestSpan


class AnswerText:
    """The text of one answer while its tokens come."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, num_prompt: int) -> None:
        self._detokenizer = Detokenizer.of(params, tokenizer)
        self._num_prompt = num_prompt
        self._num_output = 0

    def push(self, tokens: Tokens) -> Piece:
        """The piece of these tokens; a stop string in it makes it the last one, without the tokens behind."""
        texts, count = [], 0
        ids, reason = tokens.token_ids, tokens.finish_reason
        for token in ids[:-1] if tokens.by_token else ids:
            count += 1
            self._num_output += 1
            texts.append(self._detokenizer.push([token]))
            if self._detokenizer.stopped:
                break
        else:
            count, self._num_output = len(ids), self._num_output + tokens.by_token
            if reason:
                texts.append(self._detokenizer.finish())
        stopped = self._detokenizer.stopped
        reason = "stop" if stopped else reason
        return Piece(
            "".join(texts),
            ids[:count],
            Usage(self._num_prompt, self._num_output, tokens.cached_tokens),
            tokens.logprobs and tokens.logprobs[:count],
            reason,
            tokens.prompt_logprobs,
            ids[-1] if tokens.by_token and not stopped else None,
            tokens.embedding,
        )


class Answering:
    """What every route works with. `max_queue`: answers that may wait beyond those that the engine runs at once."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        max_queue: int = 1024,
        deadline_s: float | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.traces = traces or Traces("")
        self.draining = False
        self._max_queue = max_queue
        self._deadline_s = deadline_s
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._indices = itertools.count()
        self._num_admitted = 0
        self._generations: dict[Generation, str] = {}  # with the ids of their requests

    @contextmanager
    def admitted(self, num_answers: int) -> Iterator[None]:
        """Count these answers as there until the block ends. Unavailable when they are too many."""
        ready = self.engine.ready
        if self.draining or ready is None:
            raise Unavailable("the server is shutting down" if self.draining else "the engine is starting", 5)
        if self._num_admitted + num_answers > ready.max_running + self._max_queue:
            wait_s = min(max(round(self.metrics.recent_latency_s), 1), MAX_RETRY_AFTER_S)
            raise Unavailable("too many requests wait: try again later", wait_s, overloaded=True)
        self._num_admitted += num_answers
        try:
            yield
        finally:
            self._num_admitted -= num_answers

    @property
    def num_admitted(self) -> int:
        return self._num_admitted

    async def in_thread(self, function: Callable[..., Value], *args: object) -> Value:
        """Run what takes long, such as tokenising, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def check_chars(self, num_chars: int, num_messages: int = 0) -> None:
        """RequestError when a prompt of so many characters cannot fit: to tokenise it would take long."""
        if self.engine.ready is None:
            return
        max_len = self.engine.ready.max_len
        check_chars(num_chars, max_len)
        if num_messages > max_len:  # each takes a token, at least
            raise RequestError(
                f"there are {num_messages:,} messages, which the context of {max_len:,} tokens cannot hold",
                "prompt_too_long",
            )

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The token ids of prompts. RequestError says what is wrong."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        self.check_chars(max(map(len, texts), default=0))
        encoded = iter(await self.in_thread(self.tokenizer.encode_batch, texts) if texts else [])
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def answers(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        request_id: str = "",
        whole: bool = False,
        grammar_after: int | None = None,
        pooling: Pooling | None = None,
        patient: bool = False,
        operation: str = "text_completion",
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all answers as they come, each with its answer's place: `params.n` answers to a prompt follow
        one another. `whole`: one piece for each answer. `grammar_after` and `pooling`: see Submit. `patient`: without
        the deadline. `operation`: what its trace calls it. Ending the iteration early (aclose) ends them all."""
        n = params.n or 1
        kept = params.truncate_prompt_tokens
        bans = await self.in_thread(bans_of, self.tokenizer, params) if params.bad_words else []
        arrival = time.monotonic()
        deadline = arrival + self._deadline_s if self._deadline_s and not patient else None
        async with self.traces.request(operation, request_id, params, arrival) as span:
            question = Question([], params, 0, bans, grammar_after, pooling, request_id, whole, arrival, deadline, span)
            streams = []
            for prompt in prompts:
                ids, index = prompt[-kept:] if kept else prompt, next(self._indices)
                for place in range(n):
                    own, own_index = params.of_choice(place), index + place * CHOICE_STRIDE
                    one = replace(question, prompt_ids=ids, params=own, index=own_index)
                    streams.append(self._answer(one))
            async with aclosing(merge(streams)) as merged:
                async for place, piece in merged:
                    yield place, piece

    def abort(self, request_id: str | None = None) -> int:
        """End the answers of a request, or all; they get what they have, with finish_reason "abort". How many."""
        chosen = [one for one, id in self._generations.items() if request_id in (None, id)]
        for generation in chosen:
            generation.abort()
            generation.put(Tokens(generation.id, [], 0, "abort"))
        return len(chosen)

    async def _answer(self, question: Question) -> AsyncGenerator[Piece, None]:
        """One answer. When the engine dies and no piece is out yet, its successor answers from the start."""
        for is_last_try in (False, True):
            is_out = False
            pieces = self._try(question)
            try:
                async for piece in pieces:
                    is_out = True
                    yield piece
                return
            except EngineDied:
                if is_out or is_last_try or not self.engine.restarts:
                    raise
            finally:
                await pieces.aclose()
            await self.engine.wait_ready()

    async def _try(self, question: Question) -> AsyncGenerator[Piece, None]:
        text = AnswerText(self.tokenizer, question.params, len(question.prompt_ids))
        timer = self.metrics.timer(question.arrival)
        generation = self.engine.generate(
            question.prompt_ids,
            question.params,
            index=question.index,
            bans=question.bans,
            grammar_after=question.grammar_after,
            pooling=question.pooling,
        )
        self._generations[generation] = question.request_id
        loop, deadline = asyncio.get_running_loop(), question.deadline
        alarm = deadline and loop.call_later(deadline - time.monotonic(), generation.put, DeadlinePassed())
        pieces: list[Piece] = []
        try:
            async for tokens in generation:
                if tokens.error:
                    raise RequestError(*tokens.error)
                if tokens.finish_reason == "error":
                    raise EngineFailed("the engine failed on this request")
                piece = text.push(tokens)
                timer.tick(len(piece.token_ids))
                question.span.token()
                if piece.finish_reason:
                    timer.end(piece.usage)
                    question.span.answer(question.index % CHOICE_STRIDE, piece.usage, piece.finish_reason)
                if not question.whole:
                    yield piece
                else:
                    pieces.append(piece)
                    if piece.finish_reason:
                        yield joined(pieces)
                if piece.finish_reason:
                    return
        finally:
            generation.abort()
            timer.close()
            del self._generations[generation]
            if alarm:
                alarm.cancel()


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of an answer as one."""
    last = pieces[-1]
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    return replace(
        last,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=None if last.logprobs is None else logprobs,
    )


async def merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The items of all streams as they come, with the places of their streams."""
    if len(streams) == 1:
        try:
            async for piece in streams[0]:
                yield 0, piece
        finally:
            await streams[0].aclose()
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def pump(place: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((place, piece))
            queue.put_nowait((place, None))
        except BaseException as error:
            queue.put_nowait((place, error))
            raise
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    try:
        num_left = len(streams)
        while num_left:
            place, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
