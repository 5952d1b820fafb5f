"""What all routes share of HTTP: reading JSON, answering while the client is there, streams of events, errors.

Knows HTTP and the error object. Does not know what is asked or answered.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisgl.errors import RequestError
from minisgl.openai.errors import MODEL_FAULTS, error_object, request_error_object
from minisgl.server.answering import EngineFailed, Unavailable
from minisgl.server.engine_client import DeadlinePassed, EngineDied

log = logging.getLogger("minisgl.server")

Value = TypeVar("Value")
JSON_TYPE = "application/json"
STATUS = {"model_not_found": 404, "not_found": 404, **dict.fromkeys(MODEL_FAULTS, 500)}
CLIENT_GONE = 499  # nginx's; nobody reads it but the log


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def read_json(request: Request) -> Any:
    """The value of a body. Other types than JSON are refused: any page may send those from a visitor's browser."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
        raise HTTPException(415, f"the body must be sent with content-type: {JSON_TYPE}")
    try:
        return msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", "invalid_json") from None


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, JSON_TYPE)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The work's value; ClientGone, and the work is cancelled, when the client goes away. The body must be read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def event_stream(request: Request, events: AsyncGenerator[Any, None], *, done: str = "[DONE]") -> Response:
    """The events as server-sent ones, then `done`. What goes wrong before the first is raised here, and has its own
    status; later, it is an event."""
    try:
        first = await while_connected(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, done)


class EventStream(Response):
    """A response of server-sent events, which ends with the client's connection."""

    def __init__(self, first: Any, events: AsyncGenerator[Any, None], done: str) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone, OSError):  # nobody is left to tell
                await while_connected(receive, self._send_all(send))
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        async def put(event: Any) -> None:
            name = f"event: {event['type']}\n".encode() if self._named(event) else b""
            body = name + b"data: " + msgspec.json.encode(event) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await put(self._first)
            async for event in self._events:
                await put(event)
        except (ClientGone, OSError):
            raise
        except Exception as error:
            await put(error_parts(error)[1])
        last = f"data: {self._done}\n\n".encode() if self._done else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _named(self, event: Any) -> bool:
        """Events of /v1/responses have their type in a line of its own."""
        return not self._done and isinstance(event.get("type"), str)


def error_parts(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that say what went wrong; nothing of the inside."""
    if isinstance(error, RequestError):
        return STATUS.get(error.type, 400), request_error_object(error), {}
    if isinstance(error, Unavailable):
        status, type = (429, "rate_limit_error") if error.overloaded else (503, "unavailable_error")
        return status, error_object(str(error), type), {"retry-after": str(error.retry_after_s)}
    if isinstance(error, HTTPException):
        return error.status_code, error_object(str(error.detail)), dict(error.headers or {})
    if isinstance(error, ClientGone):
        return CLIENT_GONE, error_object("the client closed the connection"), {}
    if isinstance(error, DeadlinePassed):
        return 504, error_object("the request took longer than the server allows", "timeout_error"), {}
    if isinstance(error, EngineDied):
        return 500, error_object("the engine stopped before the answer was whole: send it again", "server_error"), {}
    if isinstance(error, EngineFailed):
        return 500, error_object("the engine failed on this request", "server_error"), {}
    log.error("a request failed inside the server", exc_info=error)
    return 500, error_object("internal error: the server's log has the details by x-request-id", "server_error"), {}


async def error_response(request: Request, error: Exception) -> Response:
    status, body, headers = error_parts(error)
    return json_response(body, status, headers)
