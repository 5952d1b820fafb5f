"""`minisgl serve`: an OpenAI-compatible server.

Parses flags, prints where it listens. Everything else is in minisgl.server.
"""

import importlib.util
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from minisgl.cli.options import OneLineErrors, engine_options, model_option, table_options
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError

if TYPE_CHECKING:
    from minisgl.server.protocol import Ready
    from minisgl.server.served import ServedModel

NEEDED = ("fastapi", "uvicorn", "uvloop", "zmq", "msgspec", "prometheus_client", "python_multipart")

EXAMPLES = """\b
Routes: /v1/chat/completions /v1/completions /v1/responses /v1/embeddings /v1/models /v1/files /v1/batches
/generate /tokenize /detokenize /health /health_generate /metrics /flush_cache /abort_request /get_model_info,
and a page to watch at /.

SIGTERM or Ctrl-C once lets running requests finish for --drain-s; twice aborts them.

\b
Examples:
  minisgl serve
  minisgl serve -m path/to/model --port 8000
  MINISGL_API_KEY=secret minisgl serve --host 0.0.0.0
"""


def server_options(command: Any) -> Any:
    """Flags for the fields of ServerConfig; the command gets those that were given as the dict `server`."""
    from minisgl.server.config import ServerConfig

    return table_options(command, ServerConfig, "server")


@click.command(cls=OneLineErrors, epilog=EXAMPLES, short_help="Answer requests over HTTP, as OpenAI's API does.")
@model_option
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="Let pages of this origin ask (CORS).")
@server_options
@engine_options
def serve(model: str | None, origins: tuple[str, ...], server: dict[str, Any], engine: dict[str, Any]) -> None:
    """Answer requests over HTTP, as OpenAI's API does."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MinisglError(f'{missing[0]} is not installed: pip install "minisgl[serve]"')
    from minisgl.server.config import ServerConfig
    from minisgl.server.serve import serve as run

    config = ServerConfig(**server)
    set_up_logs(config.log_format)
    run(EngineConfig(model=model or "", **engine), config, origins, on_ready=announce)


def announce(url: str, model: "ServedModel", ready: "Ready") -> None:
    """What a user needs to know once the server answers."""
    question = {"model": model.name, "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    click.echo(f"{model.name} ({ready.dtype} on {ready.device}) is served at {url}")
    click.echo(f"KV cache: {ready.capacity:,} tokens; longest request: {ready.max_len:,} tokens")
    click.echo(f"Try: curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(question)}'")


def set_up_logs(format: str) -> None:
    """Log lines of the server on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logger = logging.getLogger("minisgl")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """A JSON object a line; `extra={"fields": {...}}` adds its keys."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line |= fields or {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
