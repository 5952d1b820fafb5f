"""One launched step: what is wanted of it, what it made on the device, and the same on its way to the host.

Knows tensors and requests' wishes. Does not know models or scheduling.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.scheduler import Step
from minisgl.upload import Ints

TOP_SIZES = (0, 1, 5, 20)  # of the likeliest tokens, so that few kinds of steps are captured


class Wanted(NamedTuple):
    """What the requests of a step ask for beyond a token; a captured step is made for one of these."""

    edits: bool = False
    num_top: int | None = None  # logprobs of the sampled tokens, with those of as many likeliest; None: no logprobs
    filters: bool = True  # a row may have top-k, top-p or min-p; one rank alone does not ask

    @classmethod
    def of(cls, step: Step) -> "Wanted":
        """The most that any request of the step asks for."""
        asked = [request for request in step.sampled if request.edits_logits or request.params.logprobs is not None]
        if not asked:
            return NOTHING_MORE
        num_top = max(-1 if request.params.logprobs is None else request.params.logprobs for request in asked)
        enough = next(size for size in TOP_SIZES if size >= num_top)
        return cls(any(request.edits_logits for request in asked), enough if num_top >= 0 else None)


NOTHING_MORE, EVERYTHING = Wanted(), Wanted(edits=True, num_top=TOP_SIZES[-1])


class Logprobs(NamedTuple):
    """Logprobs of tokens and of the likeliest ones at their places, as `kernels.logprobs` gives them."""

    of_ids: torch.Tensor  # [N] fp32
    top_ids: torch.Tensor  # [N, num_top] int32
    top: torch.Tensor  # [N, num_top] fp32


class HostLogprobs(NamedTuple):
    """`Logprobs` on the host."""

    of_ids: npt.NDArray[np.float32]
    top_ids: Ints
    top: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Forward:
    """A step whose forward pass is launched: its logits until they are sampled, then what came of them."""

    wanted: Wanted
    longest: int  # no sampled position is above it
    rows: torch.Tensor  # [N] int32, row of each sample
    positions: torch.Tensor  # [N] int32, place of each sampled token
    logits: torch.Tensor | None = None  # [N, V]
    ids: torch.Tensor | None = None  # [N] int32
    logprobs: Logprobs | None = None  # of the sampled tokens
    scored: Logprobs | None = None  # of the prompt tokens that the step's chunks score, in their order
    pooled: torch.Tensor | None = None  # [chunks that pool, hidden] fp32, their sums of hidden states

    def first(self, count: int) -> "Forward":
        """The same of the first samples alone: without padding."""

        def cut(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[:count]

        logprobs = self.logprobs and Logprobs(*(x[:count] for x in self.logprobs))
        rows, positions = self.rows[:count], self.positions[:count]
        return Forward(self.wanted, self.longest, rows, positions, cut(self.logits), cut(self.ids), logprobs)


class HostResults(NamedTuple):
    """What a step gave, on the host; see `Forward`."""

    ids: Ints
    logprobs: HostLogprobs | None
    scored: HostLogprobs | None
    pooled: npt.NDArray[np.float32] | None


class StepResults:
    """What a sampled step gives, on its way to the host."""

    def __init__(self, forward: Forward) -> None:
        assert forward.ids is not None
        self._event: torch.cuda.Event | None = None
        self._ids = _to_host(forward.ids)
        self._logprobs = forward.logprobs and Logprobs(*map(_to_host, forward.logprobs))
        self._scored = forward.scored and Logprobs(*map(_to_host, forward.scored))
        self._pooled = None if forward.pooled is None else _to_host(forward.pooled)
        if forward.ids.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether `wait` would not."""
        return self._event is None or self._event.query()

    def wait(self) -> HostResults:
        """The results. This is the one place where the host waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        ids: Ints = self._ids.numpy()
        logprobs = HostLogprobs(*(x.numpy() for x in self._logprobs)) if self._logprobs else None
        scored = HostLogprobs(*(x.numpy() for x in self._scored)) if self._scored else None
        return HostResults(ids, logprobs, scored, None if self._pooled is None else self._pooled.numpy())


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Its copy on the host, complete when the stream comes to it: the next replay overwrites what is captured."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
