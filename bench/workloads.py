"""What the engine benches run: token-id prompts and output lengths, drawn with a fixed seed or read from a file.

mini           256 requests, 100..1024 tokens in and out, uniform
single         1 request, 128 in, 512 out
prefill        64 requests, 2048 in, 1 out
shared_prefix  8 groups of 64 requests: 2048 tokens shared by the group and 128 of their own in, 128 out, shuffled
FILE           a file of JSON lines as `minisgl run` takes it; a row's max_tokens is its output length

Knows nothing of engines: every engine gets the same ids and makes as many tokens, whatever it samples.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from random import Random
from typing import NamedTuple

from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.rows import BadRow, Record, Row
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams
from minisgl.tokenizer import Tokenizer

MAX_ID = 10_000
FILE_OUTPUT_LEN = 128  # of a file's rows that name no max_tokens


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


def mini(seed: int = 0) -> Workload:
    rng = Random(seed)
    prompts = [_ids(rng, rng.randint(100, 1024)) for _ in range(256)]
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
    """Requests of one shape that share nothing: what the latency bench runs."""
    rng = Random(seed)
    return Workload([_ids(rng, input_len) for _ in range(batch)], [output_len] * batch)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "mini": mini,
    "single": single,
    "prefill": prefill,
    "shared_prefix": shared_prefix,
}


def load(name: str, folder: Path, vocab_size: int) -> Workload:
    """A workload by name, or the rows of a file; ids are folded into the vocabulary of the model in `folder`.

    Of a file's rows the prompts and max_tokens count; they are sampled as all workloads are, past the end of text.
    Raises MinisglError for an unknown name, a file without rows, and a row that is not one of `minisgl run`.
    """
    if name in WORKLOADS:
        return fold(WORKLOADS[name](0), vocab_size)
    if not Path(name).is_file():
        raise MinisglError(f"workload is {name!r}; it must be one of {', '.join(WORKLOADS)}, or a file of JSON lines")
    parser, reader = RowParser(SamplingParams(max_tokens=FILE_OUTPUT_LEN)), _PromptReader(folder)
    prompts, output_lens = [], []
    for index, line in enumerate(Path(name).read_bytes().splitlines()):
        if not line.strip():
            continue
        row = parser.parse(Record(index, f"line {index + 1}", line))
        if isinstance(row, BadRow):
            raise MinisglError(f"{name}, {row.head.place}: {row.error.message}")
        prompts.append(reader.ids(row))
        output_lens.append(row.params.max_tokens or FILE_OUTPUT_LEN)
    if not prompts:
        raise MinisglError(f"{name} has no rows to measure")
    return Workload(prompts, output_lens)


def fold(workload: Workload, vocab_size: int) -> Workload:
    """The same lengths and shared prefixes with ids below `vocab_size`: small models have fewer than MAX_ID."""
    if vocab_size > MAX_ID:
        return workload
    return workload._replace(prompts=[[token % vocab_size for token in prompt] for prompt in workload.prompts])


class _PromptReader:
    """Rows to token ids; the tokenizer is loaded for the first row that needs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._folder)

    def ids(self, row: Row) -> list[int]:
        if row.prompt_token_ids is not None:
            return list(row.prompt_token_ids)
        if row.messages is not None:
            return self._tokenizer.apply_chat_template(row.messages)
        assert row.prompt is not None
        return self._tokenizer.encode(row.prompt)
