"""The offline engine: prompts in, results out.

    with LLM("path/to/model") as llm:
        results = llm.generate(["Hello", "Good morning"], SamplingParams(temperature=0))

A step is: schedule -> run -> wait for its ids -> complete -> retire what ended. With overlap the next step is scheduled
and launched before the wait, so that the device never waits for the host.

Knows every part by its interface. Holds no policy, no tensors and no file formats.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from minisgl.config import EngineConfig
from minisgl.detokenizer import Detokenizer
from minisgl.engine import Engine, PendingIds
from minisgl.errors import MinisglError, RequestError
from minisgl.models.config import ModelConfig
from minisgl.models.generation import generation_defaults
from minisgl.page_pool import PagePool
from minisgl.planner import plan_order
from minisgl.radix_cache import RadixCache
from minisgl.request import Request, Result, SamplingParams, Usage
from minisgl.resolve import resolve
from minisgl.scheduler import Scheduler, Step
from minisgl.tokenizer import Messages, Tokenizer
from minisgl.weights import resolve_model

log = logging.getLogger("minisgl")

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None

DEFAULTS = SamplingParams(max_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, ignore_eos=False)


@dataclass
class InFlight:
    """A step whose results are not handled yet."""

    step: Step
    pending: PendingIds | None = None  # None while it is being launched

    def wait_ids(self) -> npt.NDArray[np.int32]:
        assert self.pending is not None
        return self.pending.wait_ids()


class LLM:
    """A model on one device. `model` is a folder, a Hugging Face id, or None for the demo model that ships with the
    package; options are the fields of `EngineConfig`.

    Raises MinisglError when the model, the device or an option cannot be used; its message says what to do.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        known = [setting.name for setting in fields(EngineConfig)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise MinisglError(f"unknown option {unknown[0]!r}; known ones: {', '.join(known)}")
        asked = EngineConfig(model=str(model or ""), **options)
        folder = resolve_model(asked.model)
        self.model_config = ModelConfig.from_folder(folder)
        # Token ids in and out need no tokenizer; text does, and `tokenizer` then says that there is none.
        self._tokenizer = Tokenizer(folder) if any(folder.glob("tokenizer*")) else None
        eos_id = self._tokenizer.eos_id if self._tokenizer else None
        model_defaults = generation_defaults(folder, self.model_config, eos_id)
        self._eos_ids = model_defaults.eos_ids
        self._default_params = DEFAULTS.merge(vars(model_defaults.sampling))
        self.engine = Engine(resolve(asked, self.model_config), self.model_config, folder)
        self.config = self.engine.config
        cache = RadixCache(self.config.page_size, self.config.evict) if self.config.cache == "radix" else None
        pool = PagePool(self.engine.num_pages, self.config.page_size)
        self.scheduler = Scheduler(
            pool, cache, self.config.max_running, self.config.max_step_tokens, self.engine.cascade_planner()
        )
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._stopping: dict[Request, tuple[Detokenizer, list[str]]] = {}  # requests with stop strings, and their text

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; MinisglError when its folder has none."""
        if self._tokenizer is None:
            raise MinisglError("the model's folder has no tokenizer: add tokenizer.json, or send and ask for token ids")
        return self._tokenizer

    # -- a whole job at once --

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, progress: bool = False
    ) -> list[Result]:
        """Complete one or many prompts (strings, or lists of token ids); the results are in the order of the prompts.

        `params` is one for all, or one each. A prompt that cannot be served gets a result whose `error` says why; the
        others are answered. `progress` shows a bar on stderr.
        """
        if not isinstance(prompts, (Sequence, np.ndarray)):
            raise MinisglError(f"prompts must be a string, a list of token ids or a list of these, not {prompts!r}")
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        batch = cast("Sequence[Prompt]", [prompts] if one else prompts)
        return self._answer([_attempt(self._encode, prompt) for prompt in batch], params, progress)

    def chat(
        self, conversations: Messages | Sequence[Messages], params: Params = None, *, progress: bool = False
    ) -> list[Result]:
        """Answer one or many conversations, each a list of {"role": ..., "content": ...}, as `generate` does."""
        one = len(conversations) > 0 and isinstance(conversations[0], Mapping)
        batch = cast("Sequence[Messages]", [conversations] if one else conversations)
        template = self.tokenizer.apply_chat_template
        return self._answer([_attempt(template, messages) for messages in batch], params, progress)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request uses."""
        if self.scheduler.cache:
            self.scheduler.pool.free(self.scheduler.cache.clear())

    def close(self) -> None:
        """Give the device's memory back. The LLM cannot be used afterwards."""
        self._abort_all()
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- step by step: what a runner or a server drives --

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.scheduler.num_unfinished

    def new_request(self, prompt_ids: Sequence[int], params: SamplingParams, *, index: int) -> Request:
        """Check a prompt and fill in the parameters that it leaves open; RequestError says what is wrong.

        `index` identifies the request for the caller. Where `params` has no seed, one is drawn from it and the engine's
        seed, so that equal prompts differ and the same job gives the same text again.
        """
        vocab_size, max_len = self.model_config.vocab_size, self.engine.max_len
        if not len(prompt_ids):
            raise RequestError("the prompt has no tokens: give it at least one", "invalid_prompt")
        try:
            ids = np.asarray(prompt_ids)
        except ValueError:  # nested lists of different lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("a prompt must be a string or a list of integers below 2^63", "invalid_prompt")
        for extreme in (ids.min(), ids.max()):
            if not 0 <= extreme < vocab_size:
                raise RequestError(
                    f"token id {extreme} is outside the vocabulary of {vocab_size:,} ids", "invalid_token_id"
                )
        if len(ids) >= max_len:
            remedy = "shorten it"
            if max_len < self.model_config.max_position_embeddings:
                remedy += ", or raise --max-len (and, where KV memory is the limit, --memory-fraction or --num-pages)"
            raise RequestError(
                f"the prompt has {len(ids):,} tokens, and the context of {max_len:,} must hold it and the output: "
                f"{remedy}",
                "prompt_too_long",
            )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model's folder has none", "invalid_parameter")
        full = self._default_params.merge(vars(params))
        if full.seed is None:
            full = replace(full, seed=_mix(self.config.seed, index))
        assert full.max_tokens is not None
        return Request(index, ids, full, min(len(ids) + full.max_tokens, max_len), self._eos_ids)

    def submit(self, requests: list[Request]) -> None:
        """Queue a burst, ordered so that shared prefixes are neighbours."""
        if self.engine.closed:
            raise MinisglError("this LLM is closed: make a new one")
        for request in plan_order(requests, self.config.page_size, self.engine.device):
            self.scheduler.add(request)
            if request.params.stop:
                self._stopping[request] = Detokenizer(self.tokenizer, request.params.stop), []

    def step(self) -> list[tuple[Request, Result]]:
        """Launch one forward pass and handle the results of the one before it (with `overlap`; else of the same one);
        returns the requests that ended. When this raises, no result is lost: all requests are queued again. A step that
        does not fit into the device's memory is such a failure, and makes later steps smaller instead of raising."""
        try:
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

    def _step(self) -> list[tuple[Request, Result]]:
        step = self.scheduler.schedule()
        if step.num_tokens:
            launched = InFlight(step)
            self._in_flight.append(launched)
            launched.pending = self.engine.run(step)
        ended = []
        while len(self._in_flight) > (1 if step.num_tokens and self.config.overlap else 0):
            ids = self._in_flight[0].wait_ids()
            ended += self._finish(self._in_flight.popleft().step, ids)
        return ended

    def drop_waiting(self) -> list[Request]:
        """Take back the requests that wait, and return them; those that run go on."""
        dropped = list(self.scheduler.waiting)
        for request in dropped:
            self.scheduler.retire(request)
            self._stopping.pop(request, None)
        return dropped

    def _finish(self, step: Step, ids: npt.NDArray[np.int32]) -> list[tuple[Request, Result]]:
        """Hand out a step's ids and retire the requests that end with them."""
        ended = []
        for request in self.scheduler.complete(step, ids):
            self._check_stop_strings(request)
            if request.finish_reason:
                self.scheduler.retire(request)
                ended.append((request, self._result(request)))
        return ended

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, (Sequence, np.ndarray)):
            raise RequestError(f"a prompt must be a string or a list of token ids, not {prompt!r}", "invalid_prompt")
        return cast("Sequence[int]", prompt)

    def _answer(self, prompts: Sequence[Sequence[int] | RequestError], params: Params, progress: bool) -> list[Result]:
        if isinstance(params, Sequence) and len(params) != len(prompts):
            raise MinisglError(
                f"there are {len(prompts)} prompts and {len(params)} params: give one for all, or one each"
            )
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        wrong = next((one for one in each if not isinstance(one, SamplingParams)), None)
        if wrong is not None:
            raise MinisglError(f"params must be SamplingParams, one for all prompts or one each, not {wrong!r}")
        results: dict[int, Result] = {}
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            made = prompt if isinstance(prompt, RequestError) else _attempt(self.new_request, prompt, own, index=index)
            if isinstance(made, RequestError):
                results[index] = Result("", [], "error", Usage(), made)
            else:
                requests.append(made)
        self.submit(requests)
        try:
            with tqdm(total=len(prompts), initial=len(results), unit="prompt", disable=not progress) as bar:
                while self.num_unfinished:
                    ended = self.step()
                    results.update((request.index, result) for request, result in ended)
                    bar.update(len(ended))
        finally:
            self._abort_all()
        return [results[index] for index in range(len(prompts))]

    def _abort_all(self) -> None:
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            self.scheduler.retire(request)
        self._stopping.clear()

    def _check_stop_strings(self, request: Request) -> None:
        if request in self._stopping and request.tokens[request.num_tokens - 1] not in request.stop_ids:
            detokenizer, pieces = self._stopping[request]
            pieces.append(detokenizer.push([int(request.tokens[request.num_tokens - 1])]))
            if detokenizer.stopped:
                request.finish_reason = "stop"

    def _result(self, request: Request) -> Result:
        assert request.finish_reason is not None
        ids = request.output_ids
        if request in self._stopping:
            detokenizer, pieces = self._stopping.pop(request)
            text = "".join([*pieces, detokenizer.finish()])
        elif self._tokenizer:
            text = self._tokenizer.decode(ids[:-1] if ids[-1] in request.stop_ids else ids)
        else:
            text = ""
        usage = Usage(request.num_prompt, request.num_output, request.cached_tokens)
        return Result(text, ids, request.finish_reason, usage)


def _attempt(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The function's value, or the RequestError that it raised."""
    try:
        return function(*args, **options)
    except RequestError as error:
        return error


def _mix(seed: int, index: int) -> int:
    """A 63-bit seed from two numbers: SplitMix64's finaliser (Steele et al., 2014)."""
    mask = 2**64 - 1
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1
