"""What an evaluation asks and when an answer is right: one table of settings for presets, users' YAML files and flags.

Knows names, checks and where presets are. Does not know rows or models.
"""

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from minisgl.batch_run.rows import MAX_SAMPLES
from minisgl.config import check_fields, option
from minisgl.errors import MinisglError
from minisgl.evaluate.extract import MATCHES, Extractor
from minisgl.request import SamplingParams

MODES = ("generate", "choice", "ppl")
YAML_SUFFIXES = (".yaml", ".yml")


def _hidden(default: Any) -> Any:
    """A setting that only YAML files have."""
    return option(default, "", flag="")


@dataclass(frozen=True)
class Task:
    """One evaluation. An expression is a column's name, or what Jinja has between `{{` and `}}`, over the columns.

    data: an input as `minisgl run` takes it, or "demo". An option that is a pair [context, answer] puts the context
    behind the prompt. separator: between a prompt and its answer, outside of chats. sampling: of SamplingParams.
    """

    name: str = _hidden("")
    description: str = _hidden("")
    data: str | None = _hidden(None)
    few_shot_data: str | None = _hidden(None)
    sampling: Any = _hidden(None)

    split: str | None = option(None, "Split of a data set.")
    mode: str = option(
        "generate",
        "generate: extract an answer from text. choice: the likeliest option. ppl: perplexity of the prompt's text.",
        choices=MODES,
    )
    template: str | None = option(None, "A Jinja template, or a file of one, that makes the prompt from the columns.")
    prompt_column: str | None = option(None, "The column that is the prompt.")
    system: str | None = option(None, "A system message for rows that have none; makes prompts user messages.")
    chat: bool | None = option(None, "Put prompts into the model's chat template.", flag="--chat/--no-chat")
    target: str | None = option(None, "Expression of the right answer; a list has several. [default: target or answer]")
    options: str | None = option(None, "Expression of the list of answers to choose from.")
    separator: str = _hidden(" ")
    group: str | None = option(None, "Expression of a row's group: its scores are shown apart, and examples are of it.")
    extract: str = option("text", "text, number, letter, code, json:FIELD or regex:PATTERN finds the answer.")
    match: str = option("exact", "When an answer is right.", choices=MATCHES)
    tolerance: float = option(1e-6, "Of --match number, relative to the target where that is above 1.", low=0)
    few_shot: int = option(0, "Solved examples before each question, drawn with --seed.", low=0, high=1000)
    few_shot_split: str | None = option(None, "Split of the examples. [default: the evaluated one, without the row]")
    intro: str | None = option(None, "A Jinja template of what comes before the first example or question.")
    solution: str | None = option(None, "Expression of the answer that an example shows. [default: the target]")
    n: int = option(1, "Samples of each row; gives pass@k and the majority's vote.", low=1, high=MAX_SAMPLES)
    window: int | None = option(None, "Of ppl: tokens that are read at once. [default: the model's context]", low=2)
    stride: int | None = option(None, "Of ppl: tokens that each window scores. [default: the window]", low=1)

    def __post_init__(self) -> None:
        check_fields(self, MinisglError)
        Extractor(self.extract)
        if self.sampling is not None and not isinstance(self.sampling, dict):
            raise MinisglError("sampling must be a mapping, such as {max_tokens: 256}")
        SamplingParams().merge(self.sampling or {})
        if self.mode == "choice" and self.options is None:
            raise MinisglError("mode choice needs options: an expression of a row's list of answers (--options)")
        if self.mode == "ppl" and (self.chat or self.system is not None or self.few_shot):
            raise MinisglError("mode ppl scores plain text: leave --chat, --system and --few-shot out")
        if self.mode != "generate" and self.n > 1:
            raise MinisglError(f"--n is for mode generate: mode {self.mode} samples nothing")
        if self.window and self.stride and self.stride > self.window:
            raise MinisglError(f"--stride {self.stride} would leave tokens out of windows of {self.window}: lower it")


GRADING = ("name", "description", "extract", "match", "tolerance")  # may change without asking the model again


def presets() -> list[str]:
    """The names of the tasks that come with the package."""
    folder = files("minisgl.evaluate") / "tasks"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """A preset, or the task in a YAML file. MinisglError names the presets when there is no such one."""
    if name in presets():
        text = (files("minisgl.evaluate") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith(YAML_SUFFIXES):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MinisglError(f"{name} does not exist; check the path") from None
        except UnicodeDecodeError:
            raise MinisglError(f"{name} is not UTF-8 text") from None
    else:
        raise MinisglError(f"there is no task {name!r}; name a YAML file, or one of: {', '.join(presets())}")
    return parse_task(text, name)


def parse_task(text: str, name: str) -> Task:
    """The task in YAML. MinisglError, which starts with `name`, for what is wrong with it."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MinisglError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise MinisglError(f"{name} must be a mapping of settings, such as {{mode: generate, target: answer}}")
    known = [setting.name for setting in fields(Task)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are: {', '.join(known)}"
            raise MinisglError(f"{name} has an unknown setting {key!r}; {hint}")
    if isinstance(values.get("options"), list):
        values["options"] = json.dumps(values["options"])  # which is a Jinja expression
    try:
        return Task(**{"name": Path(name).stem, **values})
    except MinisglError as error:
        raise MinisglError(f"{name}: {error}") from error


def task_for(data: str) -> Task | None:
    """The preset made for a data set, if there is one."""
    return next((task for task in map(load_task, presets()) if task.data == data), None)
