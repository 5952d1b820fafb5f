"""What a decode step pays for what requests ask of it: `minisgl bench features`.

Each feature runs in turns with plain requests, on the same prompts: one repeat is a run of every line. A run counts
from when the host has a first token of every request. Forced tokens of grammars are computed at once or one by one, to
see from how many on the first pays. The command's help has the formula of each figure.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from minisgl.bench.engines import MinisglEngine, find_model
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.synthetic_tokenizer import with_tokenizer
from minisgl.bench.workloads import Workload, fold, uniform
from minisgl.engine_core import MIN_JUMP, EngineCore
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.request import Request, SamplingParams
from minisgl.structured import ResponseFormat
from minisgl.tokenizer import Tokenizer, has_tokenizer

PLAIN, FIRST = "plain", "plain, before any other"
JUMPS = (4, 8, 16, 32)  # tokens
NEVER = 1 << 30  # more tokens than any grammar forces
PROFILED_STEPS = 2  # all launch as much, and a profile of 4,000 operators takes a CPU 3 s
LONGEST_TOKEN = 32  # letters, so that a grammar of so many for each token does not end before the output does
ITEM = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "done": {"type": "boolean"}},
    "required": ["id", "done"],
    "additionalProperties": False,
}


def _always(params: SamplingParams) -> Callable[[int], SamplingParams]:
    return lambda index: params


class Line(NamedTuple):
    """One thing that is measured: what request number i asks for."""

    name: str
    asked: Callable[[int], SamplingParams] = _always(SamplingParams())
    against: str = PLAIN  # the line whose speed is compared
    min_jump: int = MIN_JUMP  # forced tokens that are computed at once
    deterministic: bool = False


def features(output_len: int) -> list[Line]:
    """Plain requests and those with a feature each, for answers of `output_len` tokens."""
    biases = {token: 1.0 - token % 3 for token in range(8)}
    letters = ResponseFormat(regex=f"[a-z]{{{LONGEST_TOKEN * output_len},}}")
    schema = ResponseFormat(json_schema={"type": "array", "items": ITEM, "minItems": output_len})
    asked = {
        "penalties": SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
        "logit_bias": SamplingParams(logit_bias=biases),
        "logprobs=5": SamplingParams(logprobs=5),
        "min_p": SamplingParams(min_p=0.05),
        "top_p": SamplingParams(top_p=0.95),
        "regex": SamplingParams(response_format=letters),
        "json_schema": SamplingParams(response_format=schema),
    }
    lines = [Line(name, _always(params)) for name, params in asked.items()]
    return [Line(PLAIN), *lines, Line("deterministic", deterministic=True)]


def jumps(tokenizer: Tokenizer, output_len: int) -> list[Line]:
    """Grammars whose every choice is followed by forced tokens, with jumps over them and without. Requests come to
    theirs in different steps."""
    pairs = (";~", "^;", "@&", "%~", "#;", "$^")
    unmerged = [pair for pair in pairs if len(tokenizer.encode(pair * 16)) == 32]
    lines = []
    for count in [count for count in JUMPS if unmerged and 4 * count <= output_len]:  # several times in an answer
        asked = partial(_forced, unmerged[0] * (count // 2))
        one_by_one = Line(f"{count} forced tokens", asked, min_jump=NEVER)
        lines += [one_by_one, Line(f"{count} at once", asked, against=one_by_one.name, min_jump=count // 2)]
    return lines


def _forced(text: str, index: int) -> SamplingParams:
    """A choice of a letter, then a text, and so on; request number `index` comes to it later than those before it."""
    forced = "".join("\\" + letter for letter in text)
    start = f"[ab]{{{1 + index % (len(text) + 1)}}}"
    return SamplingParams(response_format=ResponseFormat(regex=f"{start}({forced}[ab]){{1000,}}"))


def run(
    model: str,
    *,
    batch: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    repeats: int = 5,
    warmups: int = 1,
    json_path: Path | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Measure `batch` requests of `input_len` and `output_len` tokens; a row for each line, once all are measured.

    Other arguments as in `throughput.run`. A line that cannot run here has a row that says why, as `skipped`. The
    deterministic engine stands beside the other one: KV pages are as many as the work needs, unless told.
    """
    folder, options = find_model(model, options)
    vocab_size = ModelConfig.from_folder(folder).vocab_size
    work = fold(uniform(batch, input_len, output_len), vocab_size)
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    page_size = options.get("page_size", 64)
    options = {"num_pages": batch * (-(-(input_len + output_len) // page_size) + 1), **options}
    options = {"max_len": input_len + output_len + 1, "max_running": max(batch, 16), **options}
    with TemporaryDirectory() as temporary, ExitStack() as engines:
        folder = with_tokenizer(folder, Path(temporary), vocab_size)
        engine = engines.enter_context(MinisglEngine(folder, options))
        meter = _Meter(work, engine, engines, folder, options)
        for row in meter.rows(repeats, warmups):
            row = {
                **{"bench": "features", "engine": engine.name, "model": model},
                **{"batch": batch, "input_len": input_len, "output_len": output_len, **row},
                **{"dtype": engine.dtype, **engine.facts(), **environment(engine.device)},
            }
            if json_path:
                write_rows(json_path, [row])
            yield row


class _Meter:
    """Runs lines in turns. `engines` closes the deterministic engine, which opens when it is needed."""

    def __init__(
        self, work: Workload, engine: MinisglEngine, engines: ExitStack, folder: Path, options: dict[str, Any]
    ) -> None:
        self._work, self._engine = work, engine
        self._lines = features(work.output_lens[0])
        if has_tokenizer(folder):
            self._lines += jumps(engine.llm.tokenizer, work.output_lens[0])
        self._engines, self._other = engines, (folder, {**options, "deterministic": True})
        self._deterministic: MinisglEngine | None = None
        self._skipped: dict[str, str] = {}
        self._graphs: dict[str, str] = {}  # kinds of graphs, and the line that needed each first

    def rows(self, repeats: int, warmups: int) -> Iterator[dict[str, Any]]:
        """What was measured of each line."""
        first = Line(FIRST)
        for _ in range(warmups):
            self._rate(first)
        rates = {FIRST: [self._rate(first) for _ in range(repeats)]}
        launches = {FIRST: self._launches(first)}
        lines = [line for line in self._lines if self._can_run(line)]
        for line in lines:
            for _ in range(warmups):
                self._rate(line)
            launches[line.name] = self._launches(line)
        for _ in range(repeats):
            for line in lines:
                rates.setdefault(line.name, []).append(self._rate(line))
        for line in (first, *lines):
            pairs = zip(rates[line.against], rates[line.name], strict=True)
            costs = [100 * (plain / own - 1) for plain, own in pairs]
            yield {
                **{"feature": line.name, "against": line.against},
                "decode_tokens_per_s": round(statistics.median(rates[line.name]), 1),
                "cost_percent": round(statistics.median(costs), 2),
                "cost_percent_all": [round(cost, 2) for cost in costs],
                "launches_per_step": launches[line.name],
                "graphs_made": [kind for kind, name in self._graphs.items() if name == line.name],
            }
        for name, reason in self._skipped.items():
            yield {"feature": name, "skipped": reason}

    def _engine_of(self, line: Line) -> MinisglEngine:
        if not line.deterministic:
            return self._engine
        if self._deterministic is None:
            self._deterministic = self._engines.enter_context(MinisglEngine(*self._other))
        return self._deterministic

    def _can_run(self, line: Line) -> bool:
        try:
            self._engine_of(line).llm.check_params(line.asked(0))
        except MinisglError as error:
            self._skipped[line.name] = str(error)
            return False
        return True

    def _rate(self, line: Line) -> float:
        """Tokens a second of a run, from the first tokens on."""
        requests = self._start(line)
        num_first, started = sum(request.num_output for request in requests), time.perf_counter()
        engine = self._engine_of(line)
        engine.drain()
        seconds = time.perf_counter() - started
        graphs = self._core_of(line).engine.graphs
        for kind in [f"{key.wanted}, masked={key.masked}" for key in (graphs.keys if graphs else [])]:
            self._graphs.setdefault(kind, line.name)
        return (sum(request.num_output for request in requests) - num_first) / seconds

    def _launches(self, line: Line) -> float:
        """Kernels and copies of a step on a GPU, operators on a CPU."""
        engine = self._engine_of(line)
        self._start(line)
        on_gpu = engine.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(engine.device)  # the step that still runs is not to be counted
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                engine.llm.step()
            if on_gpu:
                torch.cuda.synchronize(engine.device)
        self._core_of(line).abort_all()
        device = engine.device.type.upper()
        averages: Any = profiler.key_averages  # torch does not type it
        counts = [int(event.count) for event in averages() if event.device_type.name == device]
        return round(sum(counts) / PROFILED_STEPS, 1)

    def _core_of(self, line: Line) -> EngineCore:
        core = self._engine_of(line).llm.core
        if not isinstance(core, EngineCore):
            raise MinisglError("this bench looks into its engine, and replicas are other processes: leave --dp out")
        return core

    def _start(self, line: Line) -> Sequence[Request]:
        """Hand over the requests, and run until each has a token."""
        engine = self._engine_of(line)
        self._core_of(line).min_jump = line.min_jump
        engine.llm.reset_prefix_cache()
        requests = engine.submit(self._work, [line.asked(index) for index in range(len(self._work.prompts))])
        while not all(request.num_output for request in requests):
            engine.llm.step()
        return requests


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    name = f"{row['feature']:<26}"
    if "skipped" in row:
        return f"{name} not measured: {row['skipped']}"
    costs = row["cost_percent_all"]
    line = f"{name} {row['decode_tokens_per_s']:>12,.1f} tokens/s {row['launches_per_step']:>8,.1f} launches a step"
    if row["feature"] == row["against"]:
        return line
    return f"{line}  {row['cost_percent']:+.2f}% ({min(costs):+.2f} .. {max(costs):+.2f}) against {row['against']}"
