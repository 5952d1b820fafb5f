"""`minisgl chat`: talk to a model, one that is loaded here or one behind `minisgl serve`.

Knows a terminal and a conversation. What answers is a `Backend`.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from minisgl.cli.options import OneLineErrors, engine_options, model_option, sampling_options, url_option
from minisgl.errors import MinisglError, RequestError
from minisgl.messages import Message
from minisgl.openai.answers import read_usage
from minisgl.request import SamplingParams, Usage

if TYPE_CHECKING:
    from minisgl import LLM

HELP = """\
/reset         forget the conversation
/system TEXT   begin anew with a system message
/save FILE     write the conversation as JSON lines that `minisgl run` reads
/stats         tokens and speed of the last answer
/exit          end (so does Ctrl-D)
\"\"\"            begins and ends a message of several lines
Ctrl-C         stops the answer"""
EXAMPLES = f"""\b
{HELP}

\b
Examples:
  minisgl chat
  minisgl chat -m path/to/model --system "Answer in one sentence." --temperature 0.7
  minisgl chat --url http://127.0.0.1:30000
"""
PROMPT, MORE, QUOTES = "> ", ". ", '"""'


class Backend(Protocol):
    """Answers a conversation piece by piece. Closing the iterator stops the answer."""

    usage: Usage  # of the last answer

    def answer(self, messages: list[Message]) -> Iterator[str]: ...


class LocalModel:
    """A model that is loaded here."""

    def __init__(self, llm: "LLM", params: SamplingParams) -> None:
        self._llm, self._params = llm, params
        self.usage = Usage()

    def answer(self, messages: list[Message]) -> Iterator[str]:
        for delta in self._llm.stream(messages, self._params):
            if delta.result:
                self.usage = delta.result.usage
                if delta.result.error:
                    raise delta.result.error
            yield delta.text


class RemoteModel:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, url: str, model: str | None, params: dict[str, Any], engine: dict[str, Any]) -> None:
        from minisgl.client import Client, check_no_engine  # urllib3 takes a tenth of a second

        check_no_engine(engine)
        self._client = Client(url)
        self._model, self._params = self._client.model(model), params
        self.usage = Usage()

    def answer(self, messages: list[Message]) -> Iterator[str]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self._model, "messages": messages, **self._params, **options}
        with contextlib.closing(self._client.stream("/v1/chat/completions", body)) as events:  # type: ignore[type-var]
            for event in events:
                if "error" in event:
                    raise RequestError(event["error"]["message"])
                if event.get("usage"):
                    self.usage = read_usage(event["usage"])
                for choice in event["choices"]:
                    delta = choice["delta"]
                    yield (delta.get("reasoning_content") or "") + (delta.get("content") or "")


@dataclass
class Shell:
    """A conversation on a terminal."""

    backend: Backend
    messages: list[Message] = field(default_factory=list)
    seconds: float = 0.0  # of the last answer
    failed: bool = False  # the last question got none

    def run(self) -> None:
        """Until /exit or the end of the input; exits with 1 when a script's last question failed."""
        self._run()
        if self.failed and not sys.stdin.isatty():
            raise SystemExit(1)

    def _run(self) -> None:
        while True:
            try:
                text = read_message()
                if text == "/exit":
                    return
                if text.startswith("/"):
                    self.command(text)
                elif text.strip():
                    self.say(text)
            except EOFError:
                return
            except KeyboardInterrupt:  # between two answers
                click.echo("\n(/exit or Ctrl-D ends)", err=True)

    def command(self, text: str) -> None:
        """Do what a line with a slash says."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        elif name == "/system" and rest:
            self.messages = [{"role": "system", "content": rest}]
        elif name == "/save" and rest:
            self.save(Path(rest).expanduser())
        elif name == "/stats":
            click.echo(self.stats(), err=True)
        else:
            click.echo(HELP, err=True)

    def say(self, text: str) -> None:
        """Ask, and print the answer as it comes. A message that cannot be answered does not stay in the conversation;
        what an answer had when it was stopped does."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        start = time.monotonic()
        answer = self.backend.answer(asked)
        try:
            with contextlib.closing(answer):  # type: ignore[type-var]
                for piece in answer:
                    pieces.append(piece)
                    click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        except MinisglError as error:
            click.echo(f"Error: {error}", err=True)
            self.failed = True
            return
        self.failed = False
        self.seconds = time.monotonic() - start
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        click.echo()

    def save(self, path: Path) -> None:
        """Write the conversation; an existing file is left as it is."""
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            click.echo(f"Error: {path}: {error.strerror}; name another file", err=True)
        else:
            click.echo(f"{len(self.messages)} messages are in {path}", err=True)

    def stats(self) -> str:
        usage = self.backend.usage
        speed = usage.completion_tokens / self.seconds if self.seconds else 0.0
        return (
            f"prompt {usage.prompt_tokens:,} tokens, {usage.cached_tokens:,} of them cached; "
            f"answer {usage.completion_tokens:,} tokens in {self.seconds:.2f} s ({speed:,.1f} tokens/s)"
        )


def read_message() -> str:
    """A line, or what stands between two lines with three quotes."""
    line = _read_line(PROMPT)
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].endswith(QUOTES):
        lines.append(_read_line(MORE))
    return "\n".join(lines).removesuffix(QUOTES).strip("\n")


def _read_line(prompt: str) -> str:
    """Prompts are for people: a script's output has the answers alone."""
    return input(prompt if sys.stdin.isatty() else "")


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Talk to a model in the terminal.")
@model_option
@url_option
@click.option("--system", metavar="TEXT", help="A system message.")
@sampling_options
@engine_options
def chat(
    model: str | None, url: str | None, system: str | None, sampling: dict[str, Any], engine: dict[str, Any]
) -> None:
    """Talk to a model in the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    params = SamplingParams(**sampling)
    if url:
        remote = RemoteModel(url, model, sampling, engine)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Shell(remote, messages).run()
        return
    from minisgl import LLM

    with LLM(model, **engine) as llm:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer, not the shell
        Shell(LocalModel(llm, params), messages).run()
