"""The engine as the API process sees it: a process that is started, answers, may die and is started again.

    engine = EngineClient(config, folder, eos_id)
    await engine.start()
    async for tokens in engine.generate(prompt_ids, params): ...

Knows messages and the life of the engine process. Does not know text, HTTP, or what to do about an answer that was cut
off: `answering` does.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import zmq
import zmq.asyncio

import minisgl
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError
from minisgl.request import Pooling, SamplingParams
from minisgl.server import protocol
from minisgl.server.protocol import CannotStart, Message, Ready, Refused, Stats, Stepped, Submit, Tokens

log = logging.getLogger("minisgl.server")

MAX_RESTART_PAUSE_S = 30.0  # between starts that fail
KILL_AFTER_S = 5.0  # an engine that was told to end


class EngineDied(Exception):
    """The engine process is gone, and with it the answer."""


class DeadlinePassed(Exception):
    """A request took longer than it may."""


class Generation:
    """A request in the engine: iterate over it for its tokens; the last have a finish_reason. Raises RequestError when
    the engine refuses it, and EngineDied. `abort` it in the end, however it ends.

    Steps whose tokens wait here come as one: a busy reader catches up, and text for many requests costs less.
    """

    def __init__(self, engine: "EngineClient", id: int) -> None:
        self._engine = engine
        self._items: deque[Tokens | Exception] = deque()
        self._arrived = asyncio.Event()
        self.id = id

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Tokens:
        """The next tokens. There are none behind those with a finish_reason."""
        await self._arrived.wait()
        item = self._items.popleft()
        while isinstance(item, Tokens) and not item.finish_reason and self._items:
            later = self._items[0]
            if isinstance(later, Exception):
                break
            item = item.then(later)
            self._items.popleft()
        if not self._items:
            self._arrived.clear()
        if isinstance(item, Exception):
            raise item
        return item

    def put(self, item: Tokens | Exception) -> None:
        self._items.append(item)
        self._arrived.set()

    def abort(self) -> None:
        """End it now, if it has not ended; its pages are free for others."""
        self._engine.abort(self.id)


class EngineClient:
    """Starts the engine process and talks to it. `ready` is what it said of itself, None while there is none."""

    def __init__(self, config: EngineConfig, folder: Path, eos_id: int | None, *, restarts: bool = True) -> None:
        asked = {name: value for name, value in vars(config).items() if name != "model"}
        self._begin = protocol.Begin(asked, str(folder.resolve()), eos_id)
        self.restarts = restarts
        self.ready: Ready | None = None
        self.stats = Stats()
        self.num_restarts = 0
        self.given_up = asyncio.Event()  # it died, and does not come back
        self._generations: dict[int, Generation] = {}
        self._ids = itertools.count()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._changed = asyncio.Condition()  # of `ready`
        self._life: asyncio.Task[None] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="minisgl-"))  # nobody else may enter it

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def num_unfinished(self) -> int:
        return len(self._generations)

    async def start(self) -> Ready:
        """Start the engine; returns when it is loaded. MinisglError says why it cannot be."""
        try:
            ready = await self._launch()
        except BaseException:
            await self.close()
            raise
        self._life = asyncio.create_task(self._live())
        return ready

    async def close(self) -> None:
        """End the engine process; every generation gets EngineDied."""
        if self._life:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        await self._end_process()
        self._fail_all()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def wait_ready(self) -> None:
        """Return when the engine answers; EngineDied when it is not going to."""
        async with self._changed:
            while self.ready is None:
                if not self._life or self._life.done():
                    raise EngineDied("the engine has stopped")
                await self._changed.wait()

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        bans: Sequence[list[int]] = (),
        grammar_after: int | None = None,
        pooling: Pooling | None = None,
    ) -> Generation:
        """Submit a prompt. `index` and `bans`: see `Core.new_request`; `grammar_after` and `pooling`: see Submit.
        EngineDied when there is no engine."""
        if self.ready is None:
            raise EngineDied("the engine is starting")
        generation = Generation(self, next(self._ids))
        form = vars(params.response_format) if params.response_format else None
        self._send(
            Submit(
                generation.id, list(prompt_ids), params.for_engine(), index, list(bans), form, grammar_after, pooling
            )
        )
        self._generations[generation.id] = generation
        return generation

    def abort(self, id: int) -> None:
        """End a request now, wherever it is; one that ended stays as it is."""
        if self._generations.pop(id, None) and self.ready:
            self._send(protocol.Abort(id))

    def flush(self) -> None:
        """Forget every cached prefix that no running request uses."""
        if self.ready is None:
            raise EngineDied("the engine is starting")
        self._send(protocol.Flush())

    # -- the process --

    async def _live(self) -> None:
        """Read what the engine says until it dies; start it again, as often as it takes."""
        pause_s = 1.0
        while True:
            while (message := await self._receive()) is not None:
                self._handle(message)
            await self._end_process()
            self._fail_all()
            if not self.restarts:
                self.given_up.set()
                return
            while self.ready is None:
                log.warning("the engine process has died: starting it again")
                self.num_restarts += 1
                try:
                    await self._launch()
                except (MinisglError, EngineDied) as error:
                    log.error("the engine does not start (%s): trying again in %.0f s", error, pause_s)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
            pause_s = 1.0

    async def _launch(self) -> Ready:
        """Start a process and wait until it is ready. MinisglError when it says that it cannot, EngineDied when it
        says nothing."""
        await self._end_process()
        path = self._folder / f"engine-{self.num_restarts}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
        self._socket.bind(f"ipc://{path}")
        os.chmod(path, 0o600)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "minisgl.server.engine_process", str(path)),
            cwd=Path(minisgl.__file__).parent.parent,  # where `minisgl` is importable, installed or not
            stdin=asyncio.subprocess.PIPE,  # closes when this process ends, and the engine then too
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._send(self._begin)
        message = await self._receive()
        if isinstance(message, CannotStart):
            raise MinisglError(message.reason)
        if not isinstance(message, Ready):
            raise EngineDied("the engine process ended while it loaded the model")
        self.stats = Stats(capacity=message.capacity, free=message.capacity)
        await self._set_ready(message)
        return message

    async def _end_process(self) -> None:
        await self._set_ready(None)
        process, self._process = self._process, None
        if process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), KILL_AFTER_S)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
        if self._socket:
            self._socket.close(linger=0)
            self._socket = None

    async def _set_ready(self, ready: Ready | None) -> None:
        self.ready = ready
        async with self._changed:
            self._changed.notify_all()

    def _fail_all(self) -> None:
        failed, self._generations = self._generations, {}
        for generation in failed.values():
            generation.put(EngineDied("the engine process died"))

    # -- messages --

    def _send(self, message: Message) -> None:
        assert self._socket is not None
        self._socket.send(protocol.encode(message))  # its queue has no end, so there is nothing to wait for

    async def _receive(self) -> protocol.FromEngine | None:
        """The next message; None when the process is gone."""
        assert self._socket is not None and self._process is not None
        frame = asyncio.ensure_future(self._socket.recv())
        death = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({frame, death}, return_when=asyncio.FIRST_COMPLETED)
            if not frame.done():  # what it said last may still be on its way
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.shield(frame), 0.01)
            return protocol.decode_from_engine(frame.result()) if frame.done() else None
        finally:
            death.cancel()
            frame.cancel()

    def _handle(self, message: protocol.FromEngine) -> None:
        if isinstance(message, Stepped):
            self.stats = message.stats
            for tokens in message.tokens:
                ended = tokens.finish_reason is not None
                generation = (self._generations.pop if ended else self._generations.get)(tokens.id, None)
                if generation:  # it may have been aborted meanwhile
                    generation.put(tokens)
        elif isinstance(message, Refused):
            generation = self._generations.pop(message.id, None)
            if generation:
                generation.put(message.error())
