"""What `LLM` and the server's engine process work with: requests of token ids in, tokens out, step by step.

`EngineCore` is one engine in this process, `Replicas` several in processes of their own. What all of them do alike is
here: a request is checked and made in the process that was asked, so that its parameters and its seed do not depend on
who answers it.

Knows requests and their defaults. Does not know what runs when, or where.
"""

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minisgl.config import EngineConfig
from minisgl.errors import MinisglError, RequestError
from minisgl.models.config import ModelConfig
from minisgl.models.generation import GenerationDefaults
from minisgl.processes import is_of_torchrun
from minisgl.request import MAX_BIASES, Pooling, Request, SamplingParams
from minisgl.structured import Matcher

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


class CoreStats(NamedTuple):
    """Requests by state, and the tokens that KV pages hold by who holds them."""

    running: int = 0
    waiting: int = 0
    capacity: int = 0
    free: int = 0
    cached: int = 0  # in the prefix tree, and read by no request
    preemptions: int = 0  # so far


class RequestMaker:
    """Makes requests of token ids for a model. config: the resolved one; its limits are of each engine."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, defaults: GenerationDefaults) -> None:
        self.config = config
        self.model_config = model_config
        self.eos_ids = defaults.eos_ids
        self._default_params = DEFAULTS.merge(vars(defaults.sampling))

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
        max_len = self.config.max_len
        assert max_len is not None
        if not len(prompt_ids):
            raise RequestError("the prompt has no tokens: give it at least one", "invalid_prompt")
        ids = _array_of(prompt_ids)
        if ids is None:
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
        full = params.over(self._default_params, seed=mix(self.config.seed, index))
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


def _array_of(prompt_ids: Sequence[int]) -> npt.NDArray[np.integer] | None:
    """Token ids  # [n] of any integer type; None where they are something else. There is at least one."""
    if isinstance(prompt_ids[0], bool):
        return None
    try:  # numpy would look at each number twice, and an array of bytes takes them as memory
        is_array = isinstance(prompt_ids, (np.ndarray, bytes, bytearray))
        ids = np.asarray(prompt_ids if is_array else array("q", prompt_ids))
    except (TypeError, OverflowError):
        return None
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None


class Core(RequestMaker, ABC):
    """A model and the requests that it answers.

    while_waiting: called now and then while a step runs that may take long. It may submit and abort: an abort frees a
    request's pages then, not when the step has ended.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, defaults: GenerationDefaults) -> None:
        super().__init__(config, model_config, defaults)
        self.while_waiting: Callable[[], object] | None = None

    @property
    def max_running(self) -> int:
        """Most requests that run at once."""
        return self.config.max_running * self.config.dp

    @property
    def devices(self) -> str:
        """What answers, in words."""
        device, size = self.config.device, self.config.tp * self.config.dp
        return device if size == 1 else f"{size} processes on {device.partition(':')[0]}"

    @property
    @abstractmethod
    def num_unfinished(self) -> int:
        """Requests that wait or run."""

    @abstractmethod
    def stats(self) -> CoreStats:
        """Where the engines stand."""

    @abstractmethod
    def submit(self, requests: list[Request]) -> None:
        """Queue a burst, ordered so that shared prefixes are neighbours."""

    @abstractmethod
    def step(self) -> list[Request]:
        """Go on; returns the requests that got tokens, of which those with a finish_reason have ended. MinisglError
        when an engine has failed."""

    @abstractmethod
    def check(self) -> None:
        """MinisglError when an engine has failed meanwhile, with no step to notice it."""

    @abstractmethod
    def abort(self, request: Request) -> None:
        """End a request now, whatever it is doing; its pages are free for others. One that ended stays as it is."""

    @abstractmethod
    def drop_waiting(self) -> list[Request]:
        """Take back the requests that wait, and return them; those that run go on."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request uses."""

    @abstractmethod
    def close(self) -> None:
        """Give the devices' memory back."""


def open_core(asked: EngineConfig, model_config: ModelConfig, folder: Path, defaults: GenerationDefaults) -> Core:
    """The engine, or the engines, that a config asks for. MinisglError when they cannot start."""
    size = asked.tp * asked.dp
    if size > 1 and is_of_torchrun() and (started := int(os.environ["WORLD_SIZE"])) != size:
        raise MinisglError(f"tp {asked.tp} x dp {asked.dp} is {size} processes, but torchrun started {started}")
    if asked.dp == 1:
        from minisgl.engine_core import EngineCore

        return EngineCore(asked, model_config, folder, defaults)
    from minisgl.replicas import Replicas  # one engine needs no other processes

    return Replicas(asked, model_config, folder, defaults)


def mix(seed: int, index: int) -> int:
    """A 63-bit seed from two numbers: SplitMix64's finaliser (Steele et al., 2014)."""
    mask = 2**64 - 1
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1
