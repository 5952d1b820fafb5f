"""What every request passes first: keys, foreign pages, sizes; and its id and its line in the log.

Knows headers and paths. Does not know bodies.
"""

import base64
import binascii
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.openai.errors import error_object
from minisgl.server.http import json_response

log = logging.getLogger("minisgl.server.access")

OPEN_PATHS = ("/health",)
ADMIN_PATHS = ("/metrics", "/stats", "/flush_cache", "/abort_request", "/")
UPLOAD_PATH = "/v1/files"
FORM_BYTES = 64 << 10  # of an upload, around the file
MAX_HEADER_BYTES = 32 << 10
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Guard:
    """ASGI middleware. A request's id, the client's x-request-id or a new one, is scope["request_id"]."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        max_body_bytes: int = 16 << 20,
        max_file_bytes: int = 200 << 20,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_key = admin_key or api_key
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_file_bytes + FORM_BYTES
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(12)
        start, status, num_bytes = time.monotonic(), 0, 0
        max_bytes = self._max_upload_bytes if scope["path"] == UPLOAD_PATH else self._max_body_bytes

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        async def read() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise HTTPException(413, f"the body has more than {max_bytes:,} bytes")
            return message

        refusal = self._refusal(scope["path"], headers, max_bytes)
        try:
            if refusal:
                await json_response(error_object(refusal[1]), refusal[0], refusal[2])(scope, receive, tell)
            else:
                await self._app(scope, read, tell)
        finally:
            fields = {
                "request_id": id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
            }
            log.info(
                "%(method)s %(path)s %(status)s in %(seconds)s s (%(request_id)s)", fields, extra={"fields": fields}
            )

    def _refusal(self, path: str, headers: Headers, max_bytes: int) -> tuple[int, str, dict[str, str]] | None:
        """Status, message and headers for a request that may not pass."""
        origin = headers.get("origin")
        if origin and origin not in self._origins and urlsplit(origin).netloc != headers.get("host"):
            return 403, "pages of other origins may not ask this server: name them with --allow-origin", {}
        key = None if path in OPEN_PATHS else self._admin_key if path in ADMIN_PATHS else self._api_key
        if key and not hmac.compare_digest(_key(headers).encode(), key.encode()):
            # Browsers ask for a password then; the user name does not matter.
            return (
                401,
                "the key is missing or wrong: send authorization: Bearer KEY",
                {"www-authenticate": 'Basic realm="minisgl"' if path in ADMIN_PATHS else "Bearer"},
            )
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            return 431, f"the headers have more than {MAX_HEADER_BYTES:,} bytes", {"connection": "close"}
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            return 413, f"the body has more than {max_bytes:,} bytes", {"connection": "close"}
        return None


def _key(headers: Mapping[str, str]) -> str:
    """The key in the authorization header; "" when there is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
