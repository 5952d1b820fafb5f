"""Flags made from the settings tables, and how every command ends: shared by all commands.

Each field of EngineConfig and SamplingParams has its help, choices and range beside it; the decorators here make one
flag of each. A flag that is not given stays out of the result, so the model's own default holds.
"""

import functools
import json
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar

import click

from minisgl.batch_run.files import read_text
from minisgl.config import EngineConfig, type_of
from minisgl.errors import MinisglError
from minisgl.processes import OF_REPLICA, Meeting, is_of_torchrun
from minisgl.request import SamplingParams
from minisgl.server.config import API_KEY_VARIABLE
from minisgl.structured import ResponseFormat

Command = TypeVar("Command", bound=Callable[..., Any])

METAVARS: dict[type, str] = {int: "N", float: "X"}
ROWS_FAILED, CANNOT_START, INTERRUPTED = 1, 2, 130  # exit codes

model_option = click.option(
    "-m", "--model", metavar="MODEL", help=next(f for f in fields(EngineConfig) if f.name == "model").metadata["help"]
)

url_option = click.option(
    "--url",
    metavar="URL",
    help="Ask an OpenAI-compatible server instead of loading a model: -m names one of its models, "
    f"{API_KEY_VARIABLE} in the environment is its key.",
)


def engine_options(command: Command) -> Command:
    """Flags for the fields of EngineConfig; the command gets those that were given as the dict `engine`.

    Where torchrun started several processes, the first one runs the command, and the others its engines' ranks: `tp`
    consecutive ones hold a model.
    """

    @functools.wraps(command)
    def on_first_rank(engine: dict[str, Any], **values: Any) -> Any:
        if not is_of_torchrun():
            return command(engine=engine, **values)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        tp = engine["tp"] = engine.get("tp") or size // engine.get("dp", 1)
        dp = engine["dp"] = engine.get("dp") or size // tp
        if tp * dp != size:
            raise MinisglError(
                f"torchrun started {size} processes, which is not --tp x --dp ({tp} x {dp}): leave one of the two out, "
                "or start as many"
            )
        if rank:
            return _follow(rank, tp, dp)
        try:
            return command(engine=engine, **values)
        finally:
            if size > 1:
                Meeting.join().dismiss(tp)  # where no engine was needed, the other ranks still wait for one

    return table_options(typing.cast(Command, on_first_rank), EngineConfig, "engine", title="Engine")


def _follow(rank: int, tp: int, dp: int) -> None:
    if dp > 1:
        os.environ[OF_REPLICA] = str(rank // tp)
    if dp > 1 and rank % tp == 0:
        from minisgl.replica_process import join  # imports torch

        join()
    else:
        from minisgl.worker import follow

        follow(tp)


def sampling_options(command: Command) -> Command:
    """Flags for the fields of SamplingParams; the command gets those that were given as the dict `sampling`, where
    those of ResponseFormat are `response_format` in OpenAI's form.

    `--seed` is the engine's: rows draw their own from it, so that two equal prompts get two different answers.
    """

    @functools.wraps(command)
    def wrapper(sampling: dict[str, Any], form: dict[str, Any], **values: Any) -> Any:
        if form:
            sampling = {**sampling, "response_format": ResponseFormat(**form).to_openai()}
        return command(sampling=sampling, **values)

    decorated: Any = table_options(wrapper, ResponseFormat, "form", title="Form of the answers")
    own = tuple(setting.name for setting in fields(EngineConfig))
    return typing.cast(Command, table_options(decorated, SamplingParams, "sampling", skip=own, title="Sampling"))


def engine_flag(name: str) -> Callable[[Command], Command]:
    """The flag of one field of EngineConfig, for commands that use no others."""
    return _flag(next(setting for setting in fields(EngineConfig) if setting.name == name))


def table_options(
    command: Command, table: type, argument: str, skip: tuple[str, ...] = (), title: str = "Options"
) -> Command:
    """Add a flag for each field of `table` that has help and is not hidden; collect and check what was given.
    `title`: of their part of the help."""
    settings = [s for s in fields(table) if s.metadata and s.metadata["flag"] != "" and s.name not in skip]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        given = {s.name: value for s in settings if (value := values.pop(s.name)) not in (None, ())}
        if given:
            table(**given)  # what a flag's type cannot say, such as a power of two
        return command(**values, **{argument: given})

    decorated: Any = wrapper
    for setting in reversed(settings):
        decorated = _flag(setting, title)(decorated)
    return typing.cast(Command, decorated)


def _flag(setting: Field[Any], title: str = "Options") -> Callable[[Command], Command]:
    flag = setting.metadata["flag"] or "--" + setting.name.replace("_", "-")
    help = setting.metadata["help"]
    kind, is_list = type_of(setting)
    if is_list:
        help += " May be given several times."
    elif setting.default is not None and setting.default is not False:
        help += f" [default: {setting.default}]"
    if kind is bool:
        return click.option(flag, setting.name, cls=_Flag, title=title, is_flag=True, default=None, help=help)
    low, high, choices = (setting.metadata[key] for key in ("low", "high", "choices"))
    type_: Any = kind
    if choices:
        type_ = click.Choice(choices)
    elif low is not None or high is not None:
        type_ = (click.IntRange if kind is int else click.FloatRange)(low, high)
    elif setting.metadata["or_file"]:
        type_ = TextOrFile()
    metavar = None if choices else METAVARS.get(kind)
    return click.option(
        *(flag, setting.name),
        cls=_Flag,
        title=title,
        type=type_,
        default=None,
        help=help,
        metavar="TEXT|FILE" if setting.metadata["or_file"] else metavar,
        multiple=is_list,
    )


class _Flag(click.Option):
    """An option that knows under which title the help has it."""

    def __init__(self, *args: Any, title: str, **settings: Any):
        super().__init__(*args, **settings)
        self.title = title


class TextOrFile(click.ParamType[str]):
    """JSON or a grammar, or the name of a file of it; gives the text."""

    name = "text|file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            text = read_text(value, param.opts[0] if param else self.name)
        except MinisglError as error:
            raise click.UsageError(str(error), ctx) from error
        if text is None and ":" not in value and "{" not in value:  # JSON and grammars have one of them
            self.fail(f"there is no file {value!r}", param, ctx)
        return value if text is None else text


class JsonObject(click.ParamType[dict[str, Any]]):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"it is not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail("it must be a JSON object", param, ctx)
        return parsed


class OneLineErrors(click.Command):
    """A command with --debug. What goes wrong is one line on stderr and exit code 2; --debug prints its traceback.

    Ctrl-C is exit code 130, with a line that says how far the command came; a second one ends the process at once.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by their titles."""
        parts: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                parts.setdefault(getattr(param, "title", "Options"), []).append(record)
        for title, records in parts.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            interrupted("Interrupted.")
        except Exception as error:
            if debug:
                traceback.print_exc()
            fail(describe(error))


def describe(error: Exception) -> str:
    """One line for an exception: the message of those that are made for users, the type too of any other."""
    if isinstance(error, MinisglError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split())


def interrupted(message: str) -> NoReturn:
    """Say it on stderr and exit with 130."""
    click.echo(message, err=True)
    sys.exit(INTERRUPTED)


def _interrupt(signum: int, frame: object) -> NoReturn:
    # A second exception on top of the first would end in a traceback somewhere; nothing waits to be saved.
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def fail(message: str) -> NoReturn:
    """Say it on stderr and exit with 2."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(CANNOT_START)
