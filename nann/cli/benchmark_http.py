"""A small HTTP/1.1 client for loads: several times cheaper than a general one, which would be measured."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import cast
from urllib.parse import urlsplit

import httptools
from typing_extensions import override

__all__ = ["HttpClient"]

# Below the 1,024 files that a process may usually open; further requests wait for a connection, and
# their wait is in their latency.
_MAX_CONNECTIONS = 512
# Below the 75 s after which the server closes an idle connection: none is to close as it is used again.
_IDLE_S = 60.0


class HttpClient:
    """Exchanges JSON with one address over kept-alive connections. For one event loop.

    `headers` go with every request made here; `tls` says whom https trusts and what it shows. Raises
    ValueError for an address that is not ``http(s)://HOST[:PORT]``.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] = MappingProxyType({}),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"expected http://HOST:PORT, not {url!r}")
        self._host, self._netloc = parts.hostname, parts.netloc
        is_tls = parts.scheme == "https"
        self._tls = (tls or True) if is_tls else None
        self._port = parts.port or (443 if is_tls else 80)
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._prefix = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._idle: list[tuple[float, _Connection]] = []
        self._slots = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of the answer; raises as `post` does."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            TimeoutError: no answer came in time.
            OSError: the server cannot be reached, or closed the connection.
            ValueError: what it sent is not HTTP.
        """
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{self._headers}\r\n"
        )
        return await self.exchange(head.encode() + body)

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to the bytes of a whole request; raises as `post` does."""
        async with self._slots:
            connection = await self._connected()
            answer = await connection.exchange(request, self._timeout_s)
            if connection.usable:
                self._idle.append((time.monotonic(), connection))
            return answer

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _connected(self) -> _Connection:
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.usable and time.monotonic() - since_s < _IDLE_S:
                return connection
            connection.close()
        opening: Awaitable[object] = asyncio.get_running_loop().create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        try:
            _, opened = cast(tuple[object, _Connection], await asyncio.wait_for(opening, self._timeout_s))
        except asyncio.TimeoutError:
            raise TimeoutError(f"no connection to {self._netloc} in {self._timeout_s:g} s") from None
        return opened


class _Connection(asyncio.Protocol):
    """One exchange at a time. httptools calls the `on_…` methods."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, timeout_s: float) -> tuple[int, bytes]:
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self._body = []
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        timer = loop.call_later(timeout_s, self._fail, TimeoutError(f"no answer in {timeout_s:g} s"))
        try:
            return await self._answer
        except BaseException:
            self.close()  # an answer may still come, and would be taken for the next one's
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # From the event loop

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ValueError(f"the server does not speak HTTP: {error}"))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(
            exc if isinstance(exc, OSError) else ConnectionResetError("the server closed the connection")
        )

    # From the parser

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # such as 100 Continue; the answer comes after it
            return
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
