"""The engine process: requests of token ids come by the socket, the engine answers them step by step.

    python -m minisgl.server.engine_process SOCKET

Knows messages and `Core`. Does not know text or HTTP. It ends with the process that started it: its stdin is a pipe
that closes then, whatever a step is doing.
"""

import logging
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import zmq

from minisgl.config import EngineConfig
from minisgl.core import Core, CoreStats, open_core
from minisgl.errors import MinisglError, RequestError
from minisgl.models.config import ModelConfig
from minisgl.models.generation import generation_defaults
from minisgl.processes import FAILED, started
from minisgl.request import Request, SamplingParams
from minisgl.server import protocol
from minisgl.server.protocol import Abort, Begin, CannotStart, Flush, Message, Ready, Refused, Stats, Submit, Tokens
from minisgl.structured import GrammarCompiler, Matcher, ResponseFormat
from minisgl.tokenizer import Tokenizer

log = logging.getLogger("minisgl")

COMPILING_POLL_MS = 1
IDLE_POLL_MS = 250  # then it looks whether other ranks live, and whether it shall end
CLOSE_S = 3.0  # until it ends whatever it does


class EngineProcess:
    """Serves an engine, or several, over `socket`."""

    def __init__(self, socket: "zmq.Socket[bytes]", core: Core, folder: Path) -> None:
        self._socket = socket
        self._core = core
        self._folder = folder
        self._requests: dict[int, Request] = {}
        self._ids: dict[Request, int] = {}
        self._num_sent: dict[Request, int] = {}  # output tokens
        self._compiler: GrammarCompiler | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammars")  # they take up to seconds
        self._compiling: dict[int, tuple[Submit, Future[Matcher]]] = {}
        self._told: CoreStats | None = None
        core.while_waiting = self._look

    def run(self, ending: threading.Event) -> None:
        """Until `ending` is set. MinisglError when a rank or a replica has failed."""
        while not ending.is_set():
            self._receive()
            if self._core.num_unfinished:
                progressed = self._core.step()
            else:
                progressed = []
                self._core.check()
            self._tell(progressed)

    def _tell(self, progressed: list[Request]) -> None:
        """Send what these requests have got, and how the engine stands if that is news."""
        stats = self._core.stats()
        if progressed or stats != self._told:
            tokens = [self._tokens(request) for request in progressed if request in self._ids]
            send(self._socket, protocol.Stepped(tokens, Stats(*stats)))
            self._told = stats

    def _look(self) -> None:
        """A step runs: whoever went away meanwhile should not wait for its end."""
        if self._socket.poll(0):
            self._take_in()
            self._tell([])

    def _receive(self) -> None:
        """Take in messages; wait for one when nothing else is to do."""
        if not self._core.num_unfinished:
            self._socket.poll(COMPILING_POLL_MS if self._compiling else IDLE_POLL_MS)
        self._take_in()

    def _take_in(self) -> None:
        """Do what all messages say that are there."""
        submitted: list[Request] = []
        while True:
            try:
                message = protocol.decode_to_engine(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            if isinstance(message, Submit) and message.response_format:
                self._compiling[message.id] = message, self._threads.submit(self._compile, message)
            elif isinstance(message, Submit):
                submitted += self._new_request(message)
            elif isinstance(message, Abort):
                self._abort(message.id, submitted)
            elif isinstance(message, Flush):
                self._core.reset_prefix_cache()
        for id in [id for id, (_, matcher) in self._compiling.items() if matcher.done()]:
            submitted += self._new_request(*self._compiling.pop(id))
        self._core.submit(submitted)

    def _new_request(self, message: Submit, matcher: "Future[Matcher] | None" = None) -> list[Request]:
        """The request, in a list; none when it is refused."""
        try:
            request = self._core.new_request(
                message.prompt_ids,
                SamplingParams(**message.params),
                index=message.index,
                bans=message.bans,
                matcher=matcher.result() if matcher else None,
                pooling=message.pooling,
            )
        except RequestError as error:
            send(self._socket, Refused(message.id, str(error), error.type))
            return []
        self._requests[message.id] = request
        self._ids[request] = message.id
        self._num_sent[request] = 0
        return [request]

    def _compile(self, message: Submit) -> Matcher:
        if self._compiler is None:
            core = self._core
            self._compiler = GrammarCompiler(Tokenizer(self._folder), core.model_config.vocab_size, core.eos_ids)
        assert message.response_format is not None
        return self._compiler.compile(ResponseFormat(**message.response_format)).matcher(message.grammar_after)

    def _abort(self, id: int, submitted: list[Request]) -> None:
        self._compiling.pop(id, None)
        request = self._requests.get(id)
        if request is None:
            return
        self._forget(request)
        if request in submitted:
            submitted.remove(request)
        else:
            self._core.abort(request)

    def _forget(self, request: Request) -> None:
        del self._requests[self._ids.pop(request)], self._num_sent[request]

    def _tokens(self, request: Request) -> Tokens:
        """What the request has got since the last time."""
        id, first = self._ids[request], self._num_sent[request]
        new = request.tokens[request.num_prompt + first : request.num_tokens].tolist()
        self._num_sent[request] = request.num_output
        logprobs = None if request.params.logprobs is None else request.logprobs[first:]
        if not request.finish_reason:
            return Tokens(id, new, request.cached_tokens, logprobs=logprobs)
        self._forget(request)
        scored = None if request.params.prompt_logprobs is None else request.prompt_logprobs
        error = (str(request.error), request.error.type) if request.error else None
        by_token = request.finish_reason == "stop" and new[-1] in request.stop_ids
        reason = request.finish_reason
        vector = request.embedding(normalize=True).astype("<f4").tobytes() if request.pooling and not error else None
        return Tokens(id, new, request.cached_tokens, reason, by_token, logprobs, scored, error, vector)


def send(socket: "zmq.Socket[bytes]", message: Message) -> None:
    socket.send(protocol.encode(message))


def load(begin: Begin) -> Core:
    """The engine of a message; MinisglError when it cannot start."""
    folder = Path(begin.folder)
    model_config = ModelConfig.from_folder(folder)
    defaults = generation_defaults(folder, model_config, begin.eos_id)
    return open_core(EngineConfig(**begin.config), model_config, folder, defaults)


def main(path: str) -> None:
    """Connect to the socket at `path`, load what the first message says, and serve. Returns when it cannot start."""
    ending = threading.Event()
    threading.Thread(target=_end_with_parent, args=[ending], daemon=True).start()
    socket = connect(zmq.Context(), path)
    begin = protocol.decode_to_engine(socket.recv())
    assert isinstance(begin, Begin), "the first message says what to load"
    try:
        core = load(begin)
    except MinisglError as error:
        send(socket, CannotStart(str(error)))
        socket.close()
        socket.context.term()  # waits until it is sent
        return
    config, capacity = core.config, core.stats().capacity
    assert config.max_len is not None
    send(
        socket,
        Ready(
            max_len=config.max_len,
            vocab_size=core.model_config.vocab_size,
            capacity=capacity,
            page_size=config.page_size,
            max_running=core.max_running,
            dtype=config.dtype,
            device=core.devices,
        ),
    )
    try:
        with started():
            EngineProcess(socket, core, Path(begin.folder)).run(ending)
    except MinisglError as error:
        log.error("Error: %s", error)
        os._exit(FAILED)
    core.close()
    os._exit(0)  # at once: taking the interpreter apart takes as long again


def connect(context: "zmq.Context[zmq.Socket[bytes]]", path: str) -> "zmq.Socket[bytes]":
    """A socket whose queues hold whatever is sent."""
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
    socket.connect(f"ipc://{path}")
    return socket


def _end_with_parent(ending: threading.Event) -> NoReturn:
    while os.read(0, 1):
        pass
    ending.set()
    time.sleep(CLOSE_S)
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    main(sys.argv[1])
