"""One job from its options to its output: what `minisgl run` does, for any caller.

    with Job(options) as job:
        if job.has_rows_left:
            with job.load() as llm:
                summary = job.answer(llm)
        job.finish()

Everything that can be wrong with the command is found before the model is loaded. Does not print.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.batch_run.files import check_writable
from minisgl.batch_run.manifest import UNRECORDED, Manifest, model_revision
from minisgl.batch_run.output import check_target, open_output, own_files
from minisgl.batch_run.parser import RowParser, Template
from minisgl.batch_run.prompts import Leaders, OnLong
from minisgl.batch_run.row_run import Summary
from minisgl.batch_run.rows import BadRow, Record, Row
from minisgl.batch_run.runner import BatchRun
from minisgl.batch_run.sources import Source, count_rows, default_output, open_sources, read_records
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError
from minisgl.request import SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM


ANY_MESSAGES = [{"role": role, "content": "Hello"} for role in ("user", "assistant")]


@dataclass(frozen=True)
class JobOptions:
    """What is asked of a job; README.md says what each means. `sampling` and `engine` hold what was given of
    SamplingParams and EngineConfig. `shard` is (i, n), the i-th of n parts."""

    inputs: Sequence[str]
    output: str | None = None
    model: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    columns: Sequence[str] | None = None
    chat: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    n: int = 1
    dedup: bool = False
    on_long: OnLong = "error"
    return_token_ids: bool = False
    ordered: bool = False
    shard: tuple[int, int] = (1, 1)
    limit: int | None = None
    max_errors: int | None = None
    max_inflight: int | None = None
    fresh: bool = False
    retry_errors: bool = False


class Job:
    """Opens inputs and output. MinisglError, which says what to do, for whatever is wrong with them.

    target: the name of the output. num_done: rows that earlier runs have done.
    """

    def __init__(self, options: JobOptions):
        self.options = options
        if "" in options.inputs or options.output == "":
            what = "-o" if options.output == "" else "an input"
            raise MinisglError(
                f"{what} is an empty name, as of a variable that is not set: name a file, or - for a pipe"
            )
        self.target = options.output or default_output(options.inputs, options.shard)
        if options.fresh and options.retry_errors:
            raise MinisglError("give --fresh or --retry-errors, not both: the first throws away what the second keeps")
        check_target(self.target)
        self.template = Template(options.template) if options.template is not None else None
        self.sources = self.open()
        self.manifest = Manifest(self.settings())
        self.parser = RowParser(
            SamplingParams(**options.sampling),
            n=options.n,
            chat=options.chat,
            system=options.system,
            prompt_column=options.prompt_column,
            template=self.template,
            columns=options.columns,
            template_kwargs=options.chat_template_kwargs,
            hash_key=self.manifest.hash_key,
        )
        self.output = open_output(
            self.target,
            self.manifest,
            ordered=options.ordered,
            dedup=options.dedup,
            fresh=options.fresh,
            retry_errors=options.retry_errors,
        )
        self.num_done = self.output.num_rows
        self.leaders = Leaders() if options.dedup else None
        self._input_end: int | None = None
        self._rows = self._left()
        self._first: Row | BadRow | None = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: object) -> None:
        self.output.close()

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, as JSON would give it back."""
        options = self.options
        return dict(
            json.loads(
                json.dumps(
                    {
                        "inputs": list(options.inputs),
                        "split": options.split,
                        "shard": options.shard,
                        **self.model_settings(),
                        "sampling": options.sampling,
                        "engine": {name: value for name, value in options.engine.items() if name not in UNRECORDED},
                        "prompt_column": options.prompt_column,
                        "template": self.template and self.template.text,
                        "system": options.system,
                        "columns": options.columns,
                        "chat": options.chat,
                        "chat_template_kwargs": options.chat_template_kwargs,
                        "n": options.n,
                        "dedup": options.dedup,
                        "on_long": options.on_long,
                        "return_token_ids": options.return_token_ids,
                        "ordered": options.ordered,
                    }
                )
            )
        )

    def model_settings(self) -> dict[str, Any]:
        """Which model answers, exactly."""
        model, engine = self.options.model, self.options.engine
        return {"model": model, "revision": revision(model), "dtype": resolved_dtype(model, engine)}

    def check_report(self, path: Path) -> None:
        """MinisglError when a report at `path` could not be written, or would take the place of a file of the job."""
        check_writable(path, "--report")
        inputs = [source.path for source in self.sources if source.path]
        if path.resolve() in [each.resolve() for each in (*inputs, *own_files(self.target))]:
            raise MinisglError(f"{path} is a file of this job, which would be lost; name another one with --report")

    def open(self) -> list[Source]:
        """What the rows come from."""
        return open_sources(self.options.inputs, self.options.split, self.target)

    def records(self) -> Iterator[Record]:
        """Every row of the input as it is there, done or not."""
        return read_records(self.sources, self.options.shard, self.options.limit, self._on_end)

    def parse(self, record: Record) -> Row | BadRow:
        """What a record asks."""
        return self.parser.parse(record)

    def count(self) -> int | None:
        """About how many `records` there are; None when that cannot be known cheaply."""
        return count_rows(self.sources, self.options.shard, self.options.limit)

    def _on_end(self, end: int) -> None:
        self._input_end = end

    def _left(self) -> Iterator[Row | BadRow]:
        """The rows that are not done yet. Those that are need no parsing, unless a later row may ask the same."""
        for record in self.records():
            done = self.output.has(record, self.parser.key)
            if not done:
                yield self.parse(record)
            elif self.leaders and isinstance(row := self.parse(record), Row):
                self.leaders.find(row)

    @property
    def has_rows_left(self) -> bool:
        """Reads up to the first row that is not done yet: a model need not be loaded when there is none."""
        if self._first is None:
            self._first = next(self._rows, None)
        return self._first is not None

    def load(self) -> "LLM":
        """The model. MinisglError when it cannot be loaded, or cannot do what was asked."""
        from minisgl.llm import LLM  # imports torch

        llm = LLM(self.options.model, **self.options.engine)
        flag = "--chat" if self.options.chat else "--system" if self.options.system is not None else ""
        if flag and not llm.tokenizer.has_chat_template:
            llm.close()
            raise MinisglError(f"{flag}: the model has no chat template; leave the flag out or choose a chat model")
        try:
            llm.check_params(self.parser.defaults)
            if kwargs := self.options.chat_template_kwargs:
                llm.chat_format.prompt(ANY_MESSAGES, self.parser.defaults, template_kwargs=kwargs)
        except BaseException:
            llm.close()
            raise
        return llm

    def answer(
        self,
        llm: "LLM",
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Summary], None] = lambda summary: None,
    ) -> Summary:
        """Answer the rows that are left. Whatever it raises, what had finished is in the output."""
        options = self.options
        batch = BatchRun(
            llm,
            self.output,
            on_long=options.on_long,
            leaders=self.leaders,
            return_token_ids=options.return_token_ids,
            max_errors=options.max_errors,
            max_inflight=options.max_inflight,
            n=options.n,
            should_stop=should_stop,
            on_progress=on_progress,
        )
        first = [] if self._first is None else [self._first]
        return batch.run(chain(first, self._rows))

    def finish(self) -> None:
        """All rows are done: make the output whole and durable."""
        self.output.finish(input_end=self._input_end)


def revision(model: str | None) -> str:
    """A name for what is in the model's folder. MinisglError when there is no such model."""
    from minisgl.weights import resolve_model  # imports torch

    return model_revision(resolve_model(model or ""))


def resolved_dtype(model: str | None, engine: dict[str, Any]) -> str:
    """What "auto" means for this model on this machine's device; MinisglError when there is no such device."""
    from minisgl.models.config import ModelConfig
    from minisgl.resolve import resolve_device, resolve_dtype  # imports torch
    from minisgl.weights import resolve_model

    asked = EngineConfig(**engine)
    checkpoint_dtype = ModelConfig.from_folder(resolve_model(model or "")).dtype
    return resolve_dtype(asked.dtype, checkpoint_dtype, resolve_device(asked.device))
