"""Requests of token ids, answered token by token: scheduler and engine as one machine.

A step is: schedule -> forward -> sample -> wait for its ids -> complete -> retire what ended. With overlap the next
step is scheduled and launched before the wait, so that the device never waits for the host. A step with grammars is
sampled only when the one before it is handled, since its masks depend on these tokens; its forward pass runs meanwhile.

Knows requests and the parts of the engine by their interface. Does not know text: `LLM` and the server do.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config import EngineConfig
from minisgl.core import Core, CoreStats
from minisgl.engine import Engine
from minisgl.errors import MinisglError
from minisgl.forward import Forward, HostLogprobs, StepResults
from minisgl.models.config import ModelConfig
from minisgl.models.generation import GenerationDefaults
from minisgl.page_pool import PagePool
from minisgl.planner import plan_order
from minisgl.radix_cache import RadixCache
from minisgl.request import Request, TokenLogprobs
from minisgl.resolve import resolve
from minisgl.scheduler import Scheduler, Step
from minisgl.structured import Matcher, fill_masks

log = logging.getLogger("minisgl")

# Forced tokens that are computed at once, like a chunk of a prompt. In bench/results/features.jsonl (Qwen3-8B, 64
# requests that come to them at different times) 4 at once save 30% of the time, 16 save 60%. Fewer were not measured.
MIN_JUMP = 4

LOOK_S = 0.001  # between calls of `while_waiting`


@dataclass
class InFlight:
    """A step whose results are not handled yet."""

    step: Step
    forward: Forward | None = None  # None while it is being launched
    results: StepResults | None = None  # None until it is sampled


class EngineCore(Core):
    """A model on one device, or on several ranks. Raises MinisglError when it cannot start."""

    def __init__(
        self, asked: EngineConfig, model_config: ModelConfig, folder: Path, defaults: GenerationDefaults
    ) -> None:
        self.engine = _new_engine(resolve(asked, model_config), model_config, folder)
        super().__init__(self.engine.config, model_config, defaults)
        cache = RadixCache(self.config.page_size, self.config.evict) if self.config.cache == "radix" else None
        pool = PagePool(self.engine.num_pages, self.config.page_size)
        self.scheduler = Scheduler(
            pool, cache, self.config.max_running, self.config.max_step_tokens, self.engine.cascade_planner()
        )
        self.min_jump = MIN_JUMP
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._progressed: list[Request] = []  # got a token that no call of `step` has told yet

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    def stats(self) -> CoreStats:
        scheduler, page_size = self.scheduler, self.config.page_size
        return CoreStats(
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.pool.num_pages * page_size,
            scheduler.pool.num_free * page_size,
            scheduler.cache.num_evictable * page_size if scheduler.cache else 0,
            scheduler.num_preemptions,
        )

    def check(self) -> None:
        self.engine.check()

    def close(self) -> None:
        self.abort_all()
        self.engine.close()

    def reset_prefix_cache(self) -> None:
        if self.scheduler.cache:
            self.scheduler.pool.free(self.scheduler.cache.clear())

    # -- requests --

    def submit(self, requests: list[Request]) -> None:
        if self.engine.closed:
            raise MinisglError("this LLM is closed: make a new one")
        for request in plan_order(requests, self.config.page_size, self.engine.device):
            self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        if not request.retired:
            request.finish_reason = request.finish_reason or "abort"
            self.scheduler.retire(request)
        if request in self._progressed:
            self._progressed.remove(request)

    def abort_all(self) -> None:
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            self.abort(request)

    def drop_waiting(self) -> list[Request]:
        dropped = list(self.scheduler.waiting)
        for request in dropped:
            self.abort(request)
        return dropped

    # -- steps --

    def step(self) -> list[Request]:
        """Launch one forward pass and handle the results of the one before it (with `overlap`; else of the same one);
        returns the requests that got a token, of which those with a finish_reason have ended. When this raises, no
        result is lost: all requests are queued again, and those that got a token are returned by the next call. A step
        that does not fit into the device's memory is such a failure, and makes later steps smaller instead of
        raising."""
        try:
            with self.engine.watched():
                self._step()
        except BaseException as error:
            while self._in_flight:
                self.scheduler.roll_back(self._in_flight.pop().step)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            if not self.scheduler.halve_steps():
                raise MinisglError(
                    f"{self.engine.device} has too little memory left for the smallest step: free it of other programs,"
                    " or lower --memory-fraction, --num-pages or --max-running"
                ) from error
            self.engine.empty_cache()
            log.warning(
                "%s is out of memory: steps have at most %d tokens from now on; --max-step-tokens makes them so from "
                "the start",
                self.engine.device,
                self.scheduler.max_step_tokens,
            )
        progressed, self._progressed = self._progressed, []
        return progressed

    def _step(self) -> None:
        step = self.scheduler.schedule()
        launched = InFlight(step) if step.num_tokens else None
        if launched:
            self._in_flight.append(launched)
            masked = any(request.matcher for request in step.sampled)
            launched.forward = self.engine.forward(step, masked=masked)
            if not masked:
                launched.results = StepResults(launched.forward)
        elif step.new_rows or step.page_updates:
            self.scheduler.roll_back(step)  # the device is not told of them
        while len(self._in_flight) > (1 if launched else 0):
            self._finish(self._in_flight[0])
        if launched and launched.results is None:
            launched.results = StepResults(self._sample_masked(launched))
        if launched and not self.config.overlap:
            self._finish(launched)

    def _sample_masked(self, launched: InFlight) -> Forward:
        """Sample a step whose forward pass runs, within the grammars of its requests."""
        assert launched.forward is not None
        sampled = launched.step.sampled
        asking = [place for place, request in enumerate(sampled) if request.matcher and request.counts]
        matchers = [request.matcher for request in sampled if request.matcher and request.counts]
        mask_of = np.full(len(sampled), -1, np.int32)
        mask_of[asking] = np.arange(len(asking), dtype=np.int32)
        masks = np.empty((len(asking), -(-self.model_config.vocab_size // 32)), np.int32)
        fill_masks(matchers, masks)
        return self.engine.sample(launched.forward, masks, mask_of)

    def _finish(self, oldest: InFlight) -> None:
        """Hand out a step's tokens and retire the requests that end with them."""
        assert oldest.results is not None
        if self.while_waiting and oldest.step.chunks:  # without chunks, a step is short
            while not oldest.results.ready:
                self.while_waiting()
                time.sleep(LOOK_S)
        ids, logprobs, scored, pooled = oldest.results.wait()
        step = self._in_flight.popleft().step
        if scored:
            _add_prompt_logprobs(step, scored)
        if pooled is not None:
            _add_hidden_sums(step, pooled)
        progressed = self.scheduler.complete(step, ids)
        if logprobs:
            _add_logprobs(step, ids, logprobs, set(progressed))
        for request in progressed:
            if request.matcher and not request.error:
                self._advance(request, request.matcher)
            if request.finish_reason:
                self.scheduler.retire(request)
        self._progressed += progressed

    def _advance(self, request: Request, matcher: Matcher) -> None:
        """Go on in a request's grammar by its last token; append the tokens that must come next, if they are many."""
        matcher.advance(int(request.tokens[request.num_tokens - 1]))
        forced = [] if request.finish_reason or request.params.logprobs is not None else matcher.forced_tokens()
        if len(forced) >= self.min_jump:
            known = request.num_tokens
            self.scheduler.extend(request, forced)
            for token in request.tokens[known : request.num_tokens].tolist():
                matcher.advance(token)
        if matcher.error:
            request.fail(matcher.error)
        elif matcher.finished:
            request.finish_reason = "stop"


def _new_engine(config: EngineConfig, model_config: ModelConfig, folder: Path) -> Engine:
    if config.tp == 1:
        return Engine(config, model_config, folder)
    from minisgl.worker import LeadingEngine  # one device needs no torch.distributed

    return LeadingEngine(config, model_config, folder)


def _add_logprobs(step: Step, ids: npt.NDArray[np.int32], logprobs: HostLogprobs, progressed: set[Request]) -> None:
    """Give the requests that got a token and ask for logprobs theirs."""
    for place, request in enumerate(step.sampled):
        num_top = request.params.logprobs
        if num_top is not None and request in progressed and not request.error:
            request.logprobs.append(_token_logprobs(int(ids[place]), logprobs, place, num_top))


def _add_prompt_logprobs(step: Step, scored: HostLogprobs) -> None:
    """Give the requests whose prompts the step scored what they do not have yet."""
    place = 0
    for chunk in step.chunks:
        request = chunk.request
        for position in range(*chunk.scored):
            if position == request.next_scored:
                token, num_top = int(request.tokens[position]), request.params.prompt_logprobs or 0
                request.prompt_logprobs.append(_token_logprobs(token, scored, place, num_top))
            place += 1


def _add_hidden_sums(step: Step, pooled: npt.NDArray[np.float32]) -> None:
    """Give the requests that ask for an embedding what a step adds to it; a first chunk begins anew."""
    pools = [chunk for chunk in step.chunks if chunk.pools]
    for chunk, hidden_sum in zip(pools, pooled, strict=True):
        request, (first, last) = chunk.request, chunk.pooled
        if request.pooling == "last" or first == 0:
            request.hidden_sum, request.num_pooled = hidden_sum.copy(), last
        elif first == request.num_pooled and request.hidden_sum is not None:
            request.hidden_sum += hidden_sum
            request.num_pooled = last


def _token_logprobs(token: int, logprobs: HostLogprobs, place: int, num_top: int) -> TokenLogprobs:
    likeliest = zip(logprobs.top_ids[place, :num_top].tolist(), logprobs.top[place, :num_top].tolist(), strict=True)
    top = tuple((other, value) for other, value in likeliest if other >= 0)  # fewer where all else is banned
    return TokenLogprobs(token, float(logprobs.of_ids[place]), top)
