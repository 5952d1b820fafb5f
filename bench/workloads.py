"""What the engine benches run: token-id prompts and output lengths, drawn with a fixed seed or read from a file.

mini           256 requests, 100..1024 tokens in and out, uniform; of another number, such as more than run at once:
               mini1024
single         1 request, 128 in, 512 out
prefill        64 requests, 2048 in, 1 out
shared_prefix  8 groups of 64 requests: 2048 tokens shared by the group and 128 of their own in, 128 out, shuffled
INxOUT         256 requests, so many tokens in and out: 512x128; of another number: 512x128x1000
FILE           a file of JSON lines as `minisgl run` takes it; a row's max_tokens is its output length

Knows nothing of engines: every engine gets the same ids and makes as many tokens, whatever it samples.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.rows import BadRow, Record, Row
from minisgl.errors import MinisglError
from minisgl.messages import Message
from minisgl.request import SamplingParams
from minisgl.tokenizer import Tokenizer

MAX_ID = 10_000
FILE_OUTPUT_LEN = 128  # of a file's rows that name no max_tokens
TEMPERATURE = 0.6
MINI = re.compile(r"mini([1-9]\d*)")
SHAPE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")
SHAPE_REQUESTS = 256


class Workload(NamedTuple):
    """Requests, all handed over at once."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


def _ids(rng: Random, count: int) -> list[int]:
    return [rng.randint(0, MAX_ID) for _ in range(count)]


def mini(seed: int = 0, batch: int = 256) -> Workload:
    rng = Random(seed)
    prompts = [_ids(rng, rng.randint(100, 1024)) for _ in range(batch)]
    return Workload(prompts, [rng.randint(100, 1024) for _ in prompts])


def single(seed: int = 0) -> Workload:
    return Workload([_ids(Random(seed), 128)], [512])


def prefill(seed: int = 0) -> Workload:
    rng = Random(seed)
    return Workload([_ids(rng, 2048) for _ in range(64)], [1] * 64)


def shared_prefix(seed: int = 0) -> Workload:
    rng = Random(seed)
    prefixes = [_ids(rng, 2048) for _ in range(8)]
    prompts = [prefix + _ids(rng, 128) for prefix in prefixes for _ in range(64)]
    rng.shuffle(prompts)
    return Workload(prompts, [128] * len(prompts))


def uniform(batch: int, input_len: int, output_len: int, seed: int = 0) -> Workload:
    """Requests of one shape that share nothing."""
    rng = Random(seed)
    return Workload([_ids(rng, input_len) for _ in range(batch)], [output_len] * batch)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "mini": mini,
    "single": single,
    "prefill": prefill,
    "shared_prefix": shared_prefix,
}


class Encoder(Protocol):
    """What a file's text becomes ids by; a Tokenizer is one."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]: ...


def name_of(workload: str) -> str:
    """What rows call a workload: its own name, or the file's."""
    return Path(workload).name


def load(name: str, model: Path | Encoder, vocab_size: int) -> Workload:
    """A workload by name, by shape, or the rows of a file; ids are folded into the vocabulary of the model, given by
    its folder or by what encodes for it.

    Of a file's rows the prompts and max_tokens count; they are sampled as all workloads are, past the end of text.
    Raises MinisglError for an unknown name, a file without rows, and a row that is not one of `minisgl run`.
    """
    if name in WORKLOADS:
        return fold(WORKLOADS[name](0), vocab_size)
    if number := MINI.fullmatch(name):
        return fold(mini(batch=int(number[1])), vocab_size)
    if shape := SHAPE.fullmatch(name):
        input_len, output_len, batch = (int(number or SHAPE_REQUESTS) for number in shape.groups())
        if not input_len * output_len * batch:
            raise MinisglError(f"workload is {name!r}; its numbers must be at least 1")
        return fold(uniform(batch, input_len, output_len), vocab_size)
    if not Path(name).is_file():
        raise MinisglError(
            f"workload is {name!r}; it must be one of {', '.join(WORKLOADS)}, a shape such as 512x128, or a file of "
            "JSON lines"
        )
    parser, reader = RowParser(SamplingParams(max_tokens=FILE_OUTPUT_LEN)), _PromptReader(model)
    prompts, output_lens = [], []
    for index, line in enumerate(Path(name).read_bytes().splitlines()):
        if not line.strip():
            continue
        row = parser.parse(Record(index, f"line {index + 1}", line))
        if isinstance(row, BadRow):
            raise MinisglError(f"{name}, {row.head.place}: {row.error.message}")
        if row.n > 1 or row.chat_options or row.params.truncate_prompt_tokens:
            raise MinisglError(
                f"{name}, {row.head.place}: a bench asks each prompt once and as it is: leave out n, tools, "
                "chat_template_kwargs and truncate_prompt_tokens"
            )
        asked = reader.ids(row)
        prompts += asked
        output_lens += [row.params.max_tokens or FILE_OUTPUT_LEN] * len(asked)
    if not prompts:
        raise MinisglError(f"{name} has no rows to measure")
    return Workload(prompts, output_lens)


def fold(workload: Workload, vocab_size: int) -> Workload:
    """The same lengths and shared prefixes with ids below `vocab_size`: small models have fewer than MAX_ID."""
    if vocab_size > MAX_ID:
        return workload
    return workload._replace(prompts=[[token % vocab_size for token in prompt] for prompt in workload.prompts])


class _PromptReader:
    """Rows to token ids; a folder's tokenizer is loaded for the first row that needs it."""

    def __init__(self, model: Path | Encoder) -> None:
        self._model = model

    @cached_property
    def _encoder(self) -> Encoder:
        return Tokenizer(self._model) if isinstance(self._model, Path) else self._model

    def ids(self, row: Row) -> list[list[int]]:
        """Of each prompt of the row."""
        if row.messages is not None:
            return [self._encoder.apply_chat_template(row.messages)]
        return [self._encoder.encode(one) if isinstance(one, str) else list(one) for one in row.prompts]
