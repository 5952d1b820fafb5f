"""minisgl as the engine benches see it: hand over a workload, get seconds and the times of tokens.

Also what all engines agree on: the model's folder, the sampling and the shape of an outcome. The other engine is in
transformers_engine.py. Knows clocks and requests; knows nothing of metrics.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

from minisgl.bench.workloads import TEMPERATURE, Workload
from minisgl.errors import MinisglError, RequestError
from minisgl.llm import LLM
from minisgl.request import Request, SamplingParams
from minisgl.weights import resolve_model

SHAPES = Path(__file__).parent / "models"  # config.json of published models: their shapes, for random weights


class Outcome(NamedTuple):
    """One run of a workload. Times are in seconds from the moment the prompts were handed over."""

    seconds: float  # until the last request ended
    output_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache; -1 where the engine does not say
    token_times: list[list[float]]  # when the host had each token, by request; empty unless asked for


class BenchEngine(Protocol):
    """An engine under measurement; a context manager that gives the device's memory back."""

    name: str
    device: torch.device
    dtype: str
    ready_s: float  # seconds from nothing to ready to answer

    def run(self, workload: Workload, with_times: bool = False) -> Outcome:
        """Answer all requests with an empty prefix cache. MinisglError when one cannot be answered."""

    def facts(self) -> dict[str, Any]:
        """What else its rows should say."""

    def __enter__(self) -> "BenchEngine": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def find_model(model: str, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model (a folder, a Hugging Face id, a name in bench/models), and the options to load it with: a
    name in bench/models is only a shape, and gets random weights."""
    shape = next((path.parent for path in SHAPES.glob("*/config.json") if path.parent.name == model), None)
    return (shape, {"load_format": "dummy", **options}) if shape else (resolve_model(model), options)


def shown(options: dict[str, Any]) -> dict[str, Any]:
    """What a row says of an engine's options; its device has a field of its own."""
    return {name: value for name, value in options.items() if name != "device"}


def open_engines(folder: Path, options: dict[str, Any], baseline: str | None) -> Iterator[BenchEngine]:
    """minisgl, then the baseline of that name, if any; each is closed before the next opens."""
    with MinisglEngine(folder, options) as engine:
        yield engine
    if baseline:
        assert baseline == "transformers"
        from minisgl.bench.transformers_engine import TransformersEngine

        with TransformersEngine(folder, options) as other:
            yield other


class MinisglEngine:
    """An LLM. `options` are the fields of EngineConfig."""

    name = "minisgl"

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        self.llm = LLM(folder, **options)
        self.ready_s = time.perf_counter() - started
        self.device = torch.device(self.llm.config.device)  # the first of them
        self.dtype = self.llm.config.dtype
        self._options = options
        self._preemptions_before = 0  # the last run

    def run(self, workload: Workload, with_times: bool = False) -> Outcome:
        token_times: list[list[float]] = [[] for _ in workload.prompts] if with_times else []
        requests: list[Request] = []

        def note_times() -> None:
            now = time.perf_counter() - started
            for request, times in zip(requests, token_times, strict=True):
                times += [now] * (request.num_output - len(times))

        self.llm.reset_prefix_cache()
        self._preemptions_before = self.llm.core.stats().preemptions
        started = time.perf_counter()
        requests += self.submit(workload)
        self.drain(note_times if with_times else None)
        seconds = time.perf_counter() - started
        cached_tokens = sum(request.cached_tokens for request in requests)
        return Outcome(seconds, sum(request.num_output for request in requests), cached_tokens, token_times)

    def submit(self, workload: Workload, asked: Sequence[SamplingParams] | None = None) -> Sequence[Request]:
        """Queue all requests; `asked`: what each one asks for beside the sampling of all. MinisglError when one does
        not fit the model."""
        params = [_sampling(length) for length in workload.output_lens]
        if asked:
            params = [one.merge(vars(changed)) for one, changed in zip(params, asked, strict=True)]
        try:
            requests = [
                self.llm.new_request(prompt, one, index=index)
                for index, (prompt, one) in enumerate(zip(workload.prompts, params, strict=True))
            ]
        except RequestError as error:
            raise MinisglError(f"the workload does not fit the model: {error}") from error
        short = next((r for r in requests if r.max_total < r.num_prompt + (r.params.max_tokens or 0)), None)
        if short is not None:
            raise MinisglError(
                f"the workload does not fit the model: a prompt of {short.num_prompt:,} tokens and "
                f"{short.params.max_tokens:,} of output exceed the context of {self.llm.config.max_len:,}"
            )
        self.llm.submit(requests)
        return requests

    def drain(self, after_step: Callable[[], object] | None = None) -> None:
        """Run until no request is left."""
        while self.llm.num_unfinished:
            self.llm.step()
            if after_step:
                after_step()

    def facts(self) -> dict[str, Any]:
        config = self.llm.config
        preemptions = self.llm.core.stats().preemptions - self._preemptions_before
        return {"num_devices": config.tp * config.dp, "preemptions": preemptions, "options": shown(self._options)}

    def __enter__(self) -> "MinisglEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.close()
        gc.collect()  # captured graphs and what they hold, before another engine looks for free memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@cache
def _sampling(output_len: int) -> SamplingParams:
    return SamplingParams(
        temperature=TEMPERATURE, top_k=0, top_p=1.0, min_p=0.0, max_tokens=output_len, ignore_eos=True
    )
