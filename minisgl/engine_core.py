"""Requests of token ids, answered token by token: scheduler and engine as one machine.

A step is: schedule -> forward -> sample -> wait for its ids -> complete -> retire what ended. With overlap the next
step is scheduled and launched before the wait, so that the device never waits for the host. A step with grammars is
sampled only when the one before it is handled, since its masks depend on these tokens; its forward pass runs meanwhile.

Knows requests and the parts of the engine by their interface. Does not know text: `LLM` and the server do.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config import EngineConfig
from minisgl.engine import Engine
from minisgl.errors import MinisglError, RequestError
from minisgl.forward import Forward, HostLogprobs, StepResults
from minisgl.models.config import ModelConfig
from minisgl.models.generation import GenerationDefaults
from minisgl.page_pool import PagePool
from minisgl.planner import plan_order
from minisgl.radix_cache import RadixCache
from minisgl.request import MAX_BIASES, Pooling, Request, SamplingParams, TokenLogprobs
from minisgl.resolve import resolve
from minisgl.scheduler import Scheduler, Step
from minisgl.structured import Matcher, fill_masks

log = logging.getLogger("minisgl")

# Forced tokens that are computed at once, in a step which is not captured. An estimate: `minisgl bench features` shows
# from how many on that pays.
MIN_JUMP = 8

DEFAULTS = SamplingParams(
    max_tokens=1024,
    min_tokens=0,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    n=1,
    ignore_eos=False,
    include_stop_str=False,
    skip_special_tokens=True,
    echo=False,
)


@dataclass
class InFlight:
    """A step whose results are not handled yet."""

    step: Step
    forward: Forward | None = None  # None while it is being launched
    results: StepResults | None = None  # None until it is sampled


class EngineCore:
    """A model on one device and the requests that it answers. Raises MinisglError when it cannot start."""

    def __init__(
        self, asked: EngineConfig, model_config: ModelConfig, folder: Path, defaults: GenerationDefaults
    ) -> None:
        self.model_config = model_config
        self.eos_ids = defaults.eos_ids
        self._default_params = DEFAULTS.merge(vars(defaults.sampling))
        self.engine = _new_engine(resolve(asked, model_config), model_config, folder)
        self.config = self.engine.config
        cache = RadixCache(self.config.page_size, self.config.evict) if self.config.cache == "radix" else None
        pool = PagePool(self.engine.num_pages, self.config.page_size)
        self.scheduler = Scheduler(
            pool, cache, self.config.max_running, self.config.max_step_tokens, self.engine.cascade_planner()
        )
        self.min_jump = MIN_JUMP
        self._in_flight: deque[InFlight] = deque()  # oldest first

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.scheduler.num_unfinished

    def close(self) -> None:
        """Give the device's memory back."""
        self.abort_all()
        self.engine.close()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request uses."""
        if self.scheduler.cache:
            self.scheduler.pool.free(self.scheduler.cache.clear())

    # -- requests --

    def new_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int,
        scored_from: int | None = None,
        target: int | None = None,
        pooling: Pooling | None = None,
        bans: Sequence[Sequence[int]] = (),
        matcher: Matcher | None = None,
    ) -> Request:
        """Check a prompt and fill in the parameters that it leaves open; RequestError says what is wrong.

        `index` identifies the request for the caller. Where `params` has no seed, one is drawn from it and the engine's
        seed, so that equal prompts differ and the same job gives the same text again. `scored_from`, `target`,
        `pooling`, `bans`, `matcher`: see `Request`.
        """
        max_len = self.engine.max_len
        if not len(prompt_ids):
            raise RequestError("the prompt has no tokens: give it at least one", "invalid_prompt")
        try:
            ids = np.asarray(prompt_ids)
        except ValueError:  # nested lists of different lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("a prompt must be a string or a list of integers below 2^63", "invalid_prompt")
        self._check_ids(ids, "")
        if target is not None:
            self._check_ids(np.array([target]), "")
        if len(ids) >= max_len:
            remedy = "shorten it"
            if max_len < self.model_config.max_position_embeddings:
                remedy += ", or raise --max-len (and, where KV memory is the limit, --memory-fraction or --num-pages)"
            raise RequestError(
                f"the prompt has {len(ids):,} tokens, and the context of {max_len:,} must hold it and the output: "
                f"{remedy}",
                "prompt_too_long",
            )
        full = self._default_params.merge(vars(params))
        if full.seed is None:
            full = replace(full, seed=mix(self.config.seed, index))
        assert full.max_tokens is not None and full.min_tokens is not None
        if full.min_tokens > full.max_tokens:
            raise RequestError(f"min_tokens is {full.min_tokens}, above max_tokens, which is {full.max_tokens}")
        self._check_ids(np.array(full.stop_token_ids, np.int64), "stop_token_ids: ")
        self._check_ids(np.array(list(full.logit_bias or ()), np.int64), "logit_bias: ")
        if scored_from is None and full.prompt_logprobs is not None:
            scored_from = 1
        total = min(len(ids) + full.max_tokens, max_len)
        request = Request(
            index,
            ids,
            full,
            total,
            self.eos_ids,
            scored_from=scored_from,
            target=target,
            pooling=pooling,
            bans=bans,
            matcher=matcher,
        )
        if len(request.biases) > MAX_BIASES:
            raise RequestError(
                f"logit_bias and, with min_tokens, the stop ids are {len(request.biases)} ids; at most {MAX_BIASES} "
                "are allowed"
            )
        return request

    def _check_ids(self, ids: npt.NDArray[np.integer], place: str) -> None:
        """RequestError unless all ids are in the vocabulary."""
        vocab_size = self.model_config.vocab_size
        for extreme in (ids.min(), ids.max()) if len(ids) else ():
            if not 0 <= extreme < vocab_size:
                raise RequestError(
                    f"{place}token id {extreme} is outside the vocabulary of {vocab_size:,} ids", "invalid_token_id"
                )

    def submit(self, requests: list[Request]) -> None:
        """Queue a burst, ordered so that shared prefixes are neighbours."""
        if self.engine.closed:
            raise MinisglError("this LLM is closed: make a new one")
        for request in plan_order(requests, self.config.page_size, self.engine.device):
            self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request now, whatever it is doing; its pages are free for others. One that ended stays as it is."""
        if not request.retired:
            request.finish_reason = request.finish_reason or "abort"
            self.scheduler.retire(request)

    def abort_all(self) -> None:
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            self.abort(request)

    def drop_waiting(self) -> list[Request]:
        """Take back the requests that wait, and return them; those that run go on."""
        dropped = list(self.scheduler.waiting)
        for request in dropped:
            self.abort(request)
        return dropped

    # -- steps --

    def step(self) -> list[Request]:
        """Launch one forward pass and handle the results of the one before it (with `overlap`; else of the same one);
        returns the requests that got a token, of which those with a finish_reason have ended. When this raises, no
        result is lost: all requests are queued again. A step that does not fit into the device's memory is such a
        failure, and makes later steps smaller instead of raising."""
        try:
            with self.engine.watched():
                return self._step()
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
            return []

    def _step(self) -> list[Request]:
        step = self.scheduler.schedule()
        launched = InFlight(step) if step.num_tokens else None
        if launched:
            self._in_flight.append(launched)
            masked = any(request.matcher for request in step.sampled)
            launched.forward = self.engine.forward(step, masked=masked)
            if not masked:
                launched.results = StepResults(launched.forward)
        progressed = []
        while len(self._in_flight) > (1 if launched else 0):
            progressed += self._finish(self._in_flight[0])
        if launched and launched.results is None:
            launched.results = StepResults(self._sample_masked(launched))
        if launched and not self.config.overlap:
            progressed += self._finish(launched)
        return progressed

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

    def _finish(self, oldest: InFlight) -> list[Request]:
        """Hand out a step's tokens and retire the requests that end with them."""
        assert oldest.results is not None
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
            if request.matcher:
                self._advance(request, request.matcher)
            if request.finish_reason:
                self.scheduler.retire(request)
        return progressed

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
            request.error, request.finish_reason = matcher.error, "error"
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
        if num_top is not None and request in progressed:
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
    pools = [chunk for chunk in step.chunks if chunk.pooled[0] < chunk.pooled[1]]
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


def mix(seed: int, index: int) -> int:
    """A 63-bit seed from two numbers: SplitMix64's finaliser (Steele et al., 2014)."""
    mask = 2**64 - 1
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1
