"""One evaluation from a task to its results: a batch-runner job whose rows are questions.

    FOLDER/answers.jsonl    what the model said; with its manifest beside it, the same command goes on from there
    FOLDER/samples.jsonl    the same rows with extracted answers and verdicts, in the order of the data
    FOLDER/results.json     metrics, and all that is needed to trust or repeat them

Knows the task and the job. Does not print.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minisgl.batch_run.job import Job, JobOptions
from minisgl.batch_run.output import OutputFile
from minisgl.batch_run.parser import RowParser, Template
from minisgl.batch_run.row_run import Summary
from minisgl.batch_run.rows import BadRow, Record, Row
from minisgl.batch_run.sources import Source, open_sources, read_records
from minisgl.errors import MinisglError
from minisgl.evaluate.asking import CONCURRENCY, AskingRun
from minisgl.evaluate.grading import grade_all, metric_names
from minisgl.evaluate.metrics import tally
from minisgl.evaluate.questions import POOL_ROWS, Questions
from minisgl.evaluate.remote import RemoteModel, RemoteRun
from minisgl.evaluate.results import check_folder, save_results, save_samples, timing
from minisgl.evaluate.scoring import ScoreRun
from minisgl.evaluate.task import GRADING, Task
from minisgl.request import SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM

DEMO = "demo"  # as data: the questions that the demo model's training held out
DEMO_QUESTIONS = 100  # of each skill, at most
GREEDY = {"temperature": 0.0, "max_tokens": 512}
ANSWERS = "answers.jsonl"


class Evaluation(Job):
    """Opens data and the folder of the results. MinisglError, which says what to do, for whatever is wrong with them.

    `sampling` and `engine` hold what was given of SamplingParams and EngineConfig. url: a server to ask instead, with
    `concurrency` requests at a time at most. Use it as a Job, then call `grade`.
    """

    def __init__(
        self,
        task: Task,
        inputs: Sequence[str],
        folder: Path,
        *,
        model: str | None = None,
        sampling: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        url: str | None = None,
        concurrency: int | None = None,
        **options: Any,
    ):
        self.task, self.folder = task, folder
        self.remote: RemoteModel | None = None
        if url is not None:
            self.remote = RemoteModel(url, model, engine or {}, concurrency or CONCURRENCY)
            model = self.remote.name
        elif concurrency is not None:
            raise MinisglError("--concurrency is for a server: name it with --url, or leave it out")
        self.seed = int((engine or {}).get("seed", 0))
        params = GREEDY | (task.sampling or {}) | (sampling or {})
        if task.n > 1 and not params["temperature"]:
            raise MinisglError(f"--n {task.n} at temperature 0 gives equal samples: add --temperature, such as 0.8")
        self.questions = Questions(task, self.seed)
        if task.few_shot:
            self._learn(inputs)
        check_folder(folder)
        folder.mkdir(exist_ok=True)
        try:
            super().__init__(
                JobOptions(
                    inputs=inputs,
                    output=str(folder / ANSWERS),
                    model=model,
                    sampling=params,
                    engine=engine or {},
                    split=task.split,
                    prompt_column=task.prompt_column,
                    template=task.template,
                    system=task.system,
                    columns=(),
                    chat=task.chat,
                    n=task.n,
                    **options,
                )
            )
        except BaseException:
            self._remove_empty_folder()
            raise

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.remote:
            self.remote.close()
        self._remove_empty_folder()

    def _remove_empty_folder(self) -> None:
        with suppress(OSError):  # it is not empty
            self.folder.rmdir()

    def _learn(self, inputs: Sequence[str]) -> None:
        """Draw the examples."""
        task = self.task
        split, data = task.few_shot_split or task.split, [task.few_shot_data] if task.few_shot_data else inputs
        parser = RowParser(
            SamplingParams(),
            chat=task.chat,
            system=task.system,
            prompt_column=task.prompt_column,
            template=Template(task.template) if task.template is not None else None,
            columns=(),
        )
        records = read_records(_open(data, split, str(self.folder / ANSWERS)), limit=POOL_ROWS)
        self.questions.learn(records, parser, same_rows=list(data) == list(inputs) and split == task.split)

    # -- what a job asks for --

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        asked = asdict(self.task).items()
        own = {name: value for name, value in asked if name not in settings and name not in GRADING}
        return {**settings, **own, "examples": self.questions.examples_hash()}

    def model_settings(self) -> dict[str, Any]:
        if self.remote is None:
            return super().model_settings()
        return {"model": self.remote.name, "revision": f"served at {self.remote.client.url}", "dtype": None}

    def open(self) -> list[Source]:
        return _open(self.options.inputs, self.options.split, self.target)

    def records(self) -> Iterator[Record]:
        return read_records(self.sources, limit=self.options.limit)

    def parse(self, record: Record) -> Row | BadRow:
        return self.questions.read(record, self.parser)

    def load(self) -> "LLM":
        if self.remote is None:
            return super().load()
        self.remote.check(self.task.mode)
        return cast("LLM", self.remote)  # the part of it that `answer` uses

    def answer(self, llm: "LLM", **watching: Any) -> Summary:
        asked: dict[str, Any] = {"max_errors": self.options.max_errors, **watching}
        if self.task.mode != "generate":
            run: AskingRun = ScoreRun(llm, self.task, self.output, **asked)
        elif self.remote:
            run = RemoteRun(self.remote, self.output, **asked)
        else:
            return super().answer(llm, **watching)
        return run.run(chain([] if self._first is None else [self._first], self._rows))

    # -- results --

    def prompt_hash(self) -> str:
        """Equal for evaluations that ask in the same words."""
        asked = ("template", "prompt_column", "system", "chat", "options", "separator", "intro")
        words = [{name: getattr(self.task, name) for name in asked}, self.template and self.template.text]
        return hashlib.sha256(json.dumps([words, self.questions.examples_hash()]).encode()).hexdigest()[:12]

    def grade(self, summary: Summary, *, allow_code: bool = False) -> dict[str, Any]:
        """Write samples.jsonl and results.json from all answers; returns what is in the latter."""
        assert isinstance(self.output, OutputFile)
        rows = islice(self.output.journal.items(), self.options.limit)  # there may be more, of a run with a higher one
        lines = (json.loads(data) for _, data in rows)
        tallies = tally(save_samples(self.folder, grade_all(self.task, lines, allow_code=allow_code)))
        total = tallies[""]
        tokens = summary.output_tokens if self.task.mode == "generate" else summary.prompt_tokens
        return save_results(
            self.folder,
            {
                "task": self.task.name,
                "metrics": [
                    {"task": f"{self.task.name}/{group}" if group else self.task.name, **value._asdict(), **one.rates()}
                    for group, one in tallies.items()
                    for value in map(one.value, metric_names(self.task))
                ],
                "rows": total.rows,
                "rows_with_errors": total.errors,
                "first_error": total.first_error,
                "outputs_not_run": total.not_run,
                **total.rates(),
                "prompt_hash": self.prompt_hash(),
                "model": self.options.model or "demo",
                "model_revision": self.manifest.settings["revision"],
                "seed": self.seed,
                "rows_of_earlier_runs": self.num_done,  # whose time is in no figure here
                **timing(summary.seconds if summary.rows else None, tokens),
                "settings": self.manifest.settings,
                "grading": {name: getattr(self.task, name) for name in GRADING},
            },
        )


def _open(inputs: Sequence[str], split: str | None, output: str) -> list[Source]:
    if list(inputs) != [DEMO]:
        return open_sources(inputs, split, output)
    if split is not None:
        raise MinisglError("the demo questions have no splits: leave --split out")
    return [Source("the demo questions", "question", lambda: enumerate(_demo_rows()), lambda: len(_demo_rows()))]


def _demo_rows() -> list[dict[str, Any]]:
    """The exam of the demo model, the skills in turn, so that its first rows have all of them."""
    from minisgl.demo.data import exam

    by_skill: dict[str, list[dict[str, Any]]] = {}
    for question in exam(DEMO_QUESTIONS):
        row = {"messages": question.messages, "answer": question.answer, "skill": question.skill}
        by_skill.setdefault(question.skill, []).append(row)
    places = [(place, row) for rows in by_skill.values() for place, row in enumerate(rows)]
    return [row for _, row in sorted(places, key=lambda pair: pair[0])]
