"""A client of OpenAI-compatible servers: JSON in and out, streams, retries, and the key that is in the environment.

Knows HTTP. Does not know what bodies and answers mean.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from minisgl.errors import MinisglError, RequestError
from minisgl.server.config import API_KEY_VARIABLE

CONNECT_S, READ_S, BACKOFF_S = 10, 600, 0.5
BUSY = (408, 429, 500, 502, 503, 504)  # the same request may be answered later
MAX_NAMES_SHOWN, MAX_QUOTED = 10, 200


def check_no_engine(given: Iterable[str]) -> None:
    """MinisglError where settings of an engine were given: the server has made its own."""
    for name in given:
        raise MinisglError(f"--url is a server that has its engine: leave --{name.replace('_', '-')} out")


class Refused(RequestError):
    """The server answered with an error. status: HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, "server_failed" if status in BUSY else "invalid_request")
        self.status = status


class Client:
    """One server. Safe for as many threads as `concurrency` says; each waits for its own answer.

    retries: how often a request is sent again where the server is busy or the connection breaks: at once, after about
    one second, two, four and so on, or when its Retry-After says. Raises MinisglError for a server that cannot be
    reached, and Refused for what it refuses. key_variable: where in the environment its key is.
    """

    def __init__(
        self, url: str, *, concurrency: int = 1, retries: int = 0, key_variable: str = API_KEY_VARIABLE
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise MinisglError(f"--url is {url!r}; it must begin with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key_variable = key_variable
        parts = urlsplit(self.url)
        proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
        settings: dict[str, Any] = {"maxsize": concurrency, "timeout": Timeout(connect=CONNECT_S, read=READ_S)}
        self._pool = ProxyManager(proxy, **settings) if proxy else PoolManager(**settings)
        self._retries = Retry(
            retries,
            backoff_factor=BACKOFF_S,
            backoff_jitter=BACKOFF_S,
            status_forcelist=BUSY if retries else (),
            allowed_methods=None,  # asking twice for an answer does no harm
            raise_on_status=False,
        )

    def models(self) -> list[str]:
        """The names of the models that are served."""
        return [str(card["id"]) for card in self._json("/v1/models", None, retries=False)["data"]]

    def model(self, asked: str | None) -> str:
        """The name of the model that is meant: the one that was asked for, or the only one."""
        try:
            names = self.models()
        except (Refused, LookupError, TypeError) as error:
            if asked is not None:
                return asked  # some servers have no list
            raise MinisglError(f"{self.url} has no list of models ({error}): name one with -m") from error
        if asked in names or (asked is None and len(names) == 1):
            return asked or names[0]
        shown = ", ".join(names[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")
        if asked is None:
            raise MinisglError(f"{self.url} serves several models: name one with -m: {shown}")
        raise MinisglError(f"{self.url} does not serve {asked!r}; -m names one of: {shown}")

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer to a body, or to a request without one."""
        return self._json(path, body, retries=True)

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """The events of an answer as they come. Ending the iteration ends the request."""
        response = self._send(path, body, streamed=True)
        try:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data not in (b"", b"[DONE]"):
                    yield json.loads(data)
        except HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()

    def _json(self, path: str, body: Any, *, retries: bool) -> Any:
        try:
            return self._send(path, body, retries=retries).json()
        except json.JSONDecodeError as error:
            raise MinisglError(f"{self.url}{path} does not answer in JSON: is it a server as OpenAI's?") from error

    def _send(self, path: str, body: Any, *, retries: bool = True, streamed: bool = False) -> BaseHTTPResponse:
        """The answer; what is not streamed is read, with a retry where the connection breaks meanwhile."""
        key = os.environ.get(self._key_variable)
        try:
            response = self._pool.request(
                "GET" if body is None else "POST",
                self.url + path,
                body=None if body is None else json.dumps(body).encode(),
                headers={"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})},
                retries=self._retries if retries else self._retries.new(total=0, status_forcelist=()),
                redirect=False,  # the key is for this server
                preload_content=not streamed,
            )
            if response.status >= 300:
                raise self._refusal(response)
            return response
        except HTTPError as error:
            raise self._unreachable(error) from error

    def _refusal(self, response: BaseHTTPResponse) -> MinisglError:
        if response.status == 401:
            return MinisglError(f"{self.url} refuses the key: put the right one into {self._key_variable}")
        text = response.data.decode(errors="replace")
        try:
            return Refused(str(json.loads(text)["error"]["message"]), response.status)
        except (ValueError, KeyError, TypeError):
            return Refused(f"the server answered with status {response.status}: {text[:MAX_QUOTED]}", response.status)

    def _unreachable(self, error: HTTPError) -> MinisglError:
        reason = getattr(error, "reason", None) or error
        return MinisglError(f"{self.url} does not answer ({reason}): start `minisgl serve`, or name another --url")
