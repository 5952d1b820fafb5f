"""A server from its start to its end: load, listen, drain.

Knows processes, sockets and signals. Does not know routes.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import uvicorn
import uvloop

from minisgl.chat import ChatFormat
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError
from minisgl.processes import FAILED, is_of_torchrun, started
from minisgl.server.answering import Answering
from minisgl.server.app import create_app
from minisgl.server.config import ServerConfig
from minisgl.server.engine_client import EngineClient
from minisgl.server.files import lock_folder
from minisgl.server.guard import MAX_HEADER_BYTES
from minisgl.server.metrics import Metrics
from minisgl.server.protocol import Ready
from minisgl.server.served import ServedModel
from minisgl.server.traces import traces_from_environment
from minisgl.tokenizer import Tokenizer
from minisgl.weights import resolve_model

log = logging.getLogger("minisgl.server")

ABORT_S = 5.0  # for aborted answers to reach their clients
KEEP_ALIVE_S = 75

OnReady = Callable[[str, ServedModel, Ready], None]  # with the URL


def serve(
    asked: EngineConfig, config: ServerConfig, origins: Collection[str] = (), on_ready: OnReady | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C. MinisglError when the model cannot be loaded or the port is taken."""
    listener = listen(config.host, config.port)
    with files_folder(config.files_dir) as files:
        uvloop.run(_serve(asked, resolve_model(asked.model), config, origins, listener, files, on_ready))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; MinisglError when there can be none. Taken first, so that nothing is loaded in vain."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise MinisglError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from error


@contextlib.contextmanager
def files_folder(named: str | None) -> Iterator[Path]:
    """The folder for files and batches, locked; a temporary one unless it is named. MinisglError when it is not
    free."""
    with contextlib.ExitStack() as stack:
        folder = Path(named or stack.enter_context(tempfile.TemporaryDirectory(prefix="minisgl-files-")))
        stack.callback(os.close, lock_folder(folder))
        yield folder


async def _serve(
    asked: EngineConfig,
    folder: Path,
    config: ServerConfig,
    origins: Collection[str],
    listener: socket.socket,
    files: Path,
    on_ready: OnReady | None,
) -> None:
    loop = asyncio.get_running_loop()
    tokenizer = await loop.run_in_executor(None, Tokenizer, folder)
    name = config.served_model_name or (Path(asked.model).name if asked.model else "demo")
    chat_format = ChatFormat(tokenizer, asked.reasoning_parser, asked.tool_parser)
    model = ServedModel(name, asked.model or name, tokenizer, chat_format)
    engine = EngineClient(asked, folder, tokenizer.eos_id, restarts=config.restart == "always" and not is_of_torchrun())
    starting = asyncio.ensure_future(engine.start())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, starting.cancel)
    try:
        ready = await starting
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    answering = Answering(
        engine,
        tokenizer,
        Metrics(name),
        max_queue=config.max_queue,
        deadline_s=config.deadline_s,
        traces=traces_from_environment(name),
    )
    server = Server(
        uvicorn.Config(
            create_app(answering, model, config, files, origins),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=4 * MAX_HEADER_BYTES,  # up to here the guard can say what is wrong
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(config.drain_s + ABORT_S),
        )
    )

    def drain() -> None:
        """First time: finish what runs. Again, or when it takes too long: abort it."""
        if answering.draining:
            answering.abort()
            return
        log.info("draining: %d answers have %g s to finish", answering.num_admitted, config.drain_s)
        answering.draining = True
        server.should_exit = True
        loop.call_later(config.drain_s, answering.abort)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, drain)
    if on_ready:
        on_ready(_url(config.host, listener), model, ready)
    ends_with_engine = is_of_torchrun()  # as the other ranks do

    def give_up(_: object) -> None:
        server.should_exit = ends_with_engine
        log.error("the engine has failed and is not started again: start the server again")

    giving_up = asyncio.create_task(engine.given_up.wait())
    giving_up.add_done_callback(give_up)
    with started():
        await server.serve([listener])
    giving_up.remove_done_callback(give_up)
    giving_up.cancel()
    if engine.given_up.is_set() and ends_with_engine:
        sys.exit(FAILED)


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
