"""One HTTP connection, with the limits that uvicorn does not have.

uvicorn's own protocol waits for ever for the rest of a request, lets a head grow without bound, holds any
number of connections, and waits for ever for a caller who does not read the answer.

Connections above the limit are answered 503 and closed, but a few of them may ask the probes and /metrics:
an orchestrator that is turned away kills a server that has nothing worse than many callers.

What the turnstile refuses is answered from here, and its body is read over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import orjson
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from nann.service.logs import new_request_id
from nann.service.wire.rest_json import body_of_error

__all__ = ["REFUSALS", "Limits", "Refusal", "RefusalOf", "limited_connection"]

# Failures of a connection, before there is a request: code -> status.
REFUSALS: Final = {"malformed_http": 400, "headers_too_large": 431, "too_many_connections": 503}
# What may be asked on a connection above the limit, and by how many: kubelet, a load balancer or two and
# Prometheus, each with a connection at a time. They have to be quick, so that callers cannot hold these, too.
_PROBES: Final = (b"/livez", b"/readyz", b"/healthz", b"/metrics")
_RESERVED: Final = 16
_RESERVED_TIMEOUT_S: Final = 5.0
# Requests sent ahead of their answers; each costs memory, and nobody but a load generator sends more.
_MAX_PIPELINED: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may cost; see the settings of these names."""

    max_connections: int
    max_header_bytes: int
    client_timeout_s: float


class Refusal(NamedTuple):
    """The answer to a request that there is no room for."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


# Given method, target and headers of a request; None: there is room, as far as these tell.
RefusalOf: TypeAlias = Callable[[bytes, bytes, Sequence[tuple[bytes, bytes]]], Refusal | None]


def limited_connection(
    limits: Limits, on_refused: Callable[[], None], refusal_of: RefusalOf
) -> type[asyncio.Protocol]:
    """The protocol class for ``uvicorn.Config(http=…)``, which makes its instances itself.

    `on_refused` hears of each connection that is closed because there are too many; `refusal_of` says which
    requests there is no room for.
    """

    class LimitedConnection(_Connection):
        LIMITS = limits
        ON_REFUSED = staticmethod(on_refused)
        REFUSAL_OF = staticmethod(refusal_of)

    return LimitedConnection


class _Refused(Exception):
    """Ends the parsing; the caller has been answered."""


class _Answered:
    """Stands for the exchange of a request that was answered without one; uvicorn skips the rest of it."""

    response_complete = True

    def __init__(self) -> None:
        self.message_event = asyncio.Event()


_ANSWERED: Final = _Answered()


class _Connection(HttpToolsProtocol):
    LIMITS: Limits
    ON_REFUSED: Callable[[], None]
    REFUSAL_OF: RefusalOf

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._in_head = True
        self._unfinished_head_bytes = 0
        self._chunk_ended_a_request = False
        self._is_reserved = False

    # From the transport

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        n_above = len(self.connections) - self.LIMITS.max_connections
        if n_above > _RESERVED:
            # Not even an answer: who holds this many connections does not read it.
            self.ON_REFUSED()
            transport.abort()
            return
        self._is_reserved = n_above > 0
        self._reading = self._later(self._too_slow)

    @override
    def data_received(self, data: bytes) -> None:
        self._chunk_ended_a_request = False
        super().data_received(data)
        if self._reading is None and not self._chunk_ended_a_request:
            self._reading = self._later(self._too_slow)
        # The parser itself keeps a header until it is complete, so nobody else sees it grow.
        if self._in_head and not self._chunk_ended_a_request:
            self._unfinished_head_bytes += len(data)
            if self._unfinished_head_bytes > self.LIMITS.max_header_bytes:
                self._refuse_head()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._later(self.transport.abort)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    # From the parser

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        self._unfinished_head_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.LIMITS.max_header_bytes:
            self._refuse_head()
            raise _Refused
        if len(self.pipeline) >= _MAX_PIPELINED:
            self.send_400_response(f"more than {_MAX_PIPELINED} requests wait for an answer")
            raise _Refused
        if self._is_reserved and self.url.partition(b"?")[0] not in _PROBES:
            self.ON_REFUSED()
            limit = self.LIMITS.max_connections
            self._refuse("too_many_connections", f"{limit} connections are open, and no more are taken")
            raise _Refused
        if self._turned_away():
            return
        super().on_headers_complete()
        if self._is_reserved and self.cycle is not None:
            self.cycle.keep_alive = False

    @override
    def on_message_complete(self) -> None:
        self._in_head = True
        self._chunk_ended_a_request = True
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().on_message_complete()

    def _turned_away(self) -> bool:
        """Answer the request if there is no room for it; for the usual kind, that has nobody before it."""
        if (
            not (self.cycle is None or self.cycle.response_complete)
            or self.expect_100_continue
            or self.parser.get_http_version() != "1.1"
            or not self.parser.should_keep_alive()
        ):
            return False
        refusal = self.REFUSAL_OF(self.parser.get_method(), self.url, self.headers)
        if refusal is None:
            return False
        self.cycle = _ANSWERED  # type: ignore[assignment]
        lines = [*self.server_state.default_headers, *refusal.headers]
        head = b"".join(b"%s: %s\r\n" % line for line in lines)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[refusal.status], head, refusal.body))
        self.on_response_complete()
        return True

    # Answers

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse("malformed_http", msg)

    def _refuse_head(self) -> None:
        self._refuse(
            "headers_too_large", f"the request line and headers exceed {self.LIMITS.max_header_bytes} bytes"
        )

    def _refuse(self, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        content = orjson.dumps(body_of_error(code, message, new_request_id()))
        self.transport.write(
            STATUS_LINE[REFUSALS[code]] + b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(content), content)
        )
        self.transport.close()

    # Time

    def _later(self, then: Callable[[], None]) -> asyncio.TimerHandle:
        timeout_s = self.LIMITS.client_timeout_s
        if self._is_reserved:
            timeout_s = min(timeout_s, _RESERVED_TIMEOUT_S)
        return self.loop.call_later(timeout_s, then)

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._reading = self._later(self._too_slow)
        else:
            self._reading = None
            self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
