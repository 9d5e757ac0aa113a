"""The four ways to send an operation: HTTP and gRPC, blocking and on an event loop.

Each is the same three steps, encode, send and decode, of which `rest` and `native` do the first and the
last. A transport owns its connections, keeps them between calls, and may be shared: the blocking ones
by threads, the others by the tasks of one event loop.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import httpx

from nann_client import rest
from nann_client.errors import BadReply, ConnectionFailed, DeadlineExceeded
from nann_client.operations import Operation

__all__ = ["AsyncTransport", "Server", "Transport", "async_transport", "transport"]

# Idle connections are ours to close before a server or a proxy does (usually after 60 s or more): the
# other way round a request may be sent into a connection that is just being closed.
_LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=30.0)
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),  # a reply is as large as what was asked for
    ("grpc.enable_retries", 0),  # one policy, and it is ours
    # The core waits a second and more before it connects again; a restart should cost less.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the service is: ``http://``, ``https://``, ``grpc://`` or ``grpcs://`` HOST:PORT.

    `headers` go with every call (gRPC: as metadata). `ca_file` holds the certificates to trust in place
    of the system's; `client_cert` names the files of the caller's own certificate and of its key.

    Raises:
        ValueError: the URL is none of these, or it is one without TLS and there are certificates.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    ca_file: str | Path | None = None
    client_cert: tuple[str | Path, str | Path] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.netloc:
            raise ValueError(f"{self.url!r} is not http://, https://, grpc:// or grpcs:// with HOST:PORT")
        if parts.scheme in ("http", "grpc") and (self.ca_file or self.client_cert):
            raise ValueError(f"ca_file and client_cert are for TLS: {parts.scheme}s://{parts.netloc}")

    @property
    def is_grpc(self) -> bool:
        return self.url.startswith("grpc")

    @property
    def target(self) -> str:
        """HOST:PORT, for gRPC."""
        return urlsplit(self.url).netloc

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers, for gRPC, whose names are in lower case."""
        return tuple((name.lower(), value) for name, value in self.headers.items())


class Transport(Protocol):
    """What a `Client` sends by; raises NannError."""

    def send(self, operation: Operation[Any], deadline_s: float) -> Any:
        """The result of `operation`, before ``time.monotonic()`` is `deadline_s`."""
        ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """What an `AsyncClient` sends by; raises NannError."""

    async def send(self, operation: Operation[Any], deadline_s: float) -> Any: ...

    async def close(self) -> None: ...


def transport(server: Server) -> Transport:
    """The blocking transport of the URL's scheme."""
    if not server.is_grpc:
        return _Http(server)
    from nann_client.channels import BlockingChannel

    return BlockingChannel(server, _CHANNEL_OPTIONS)


def async_transport(server: Server) -> AsyncTransport:
    """The transport for an event loop, of the URL's scheme."""
    if not server.is_grpc:
        return _AsyncHttp(server)
    from nann_client.channels import LoopChannel

    return LoopChannel(server, _CHANNEL_OPTIONS)


class _TimeLeft(dict[str, float]):
    """httpx's timeouts of connecting, sending and reading: for each what is left of the call's time.

    Fixed ones would add up: a call would take three times its time before it is given up.
    """

    def __init__(self, deadline_s: float) -> None:
        super().__init__()
        self._deadline_s = deadline_s

    def get(self, key: str, default: Any = None) -> float:
        return max(1e-3, self._deadline_s - time.monotonic())


def _http_options(server: Server) -> dict[str, Any]:
    options = {"base_url": server.url, "headers": dict(server.headers), "limits": _LIMITS}
    if server.ca_file is not None or server.client_cert is not None:
        tls = ssl.create_default_context(cafile=server.ca_file)
        if server.client_cert is not None:
            tls.load_cert_chain(*server.client_cert)
        options["verify"] = tls
    return options


def _http_call(operation: Operation[Any], deadline_s: float) -> dict[str, Any]:
    request = rest.request_of(operation, max(1e-3, deadline_s - time.monotonic()))
    return {
        "method": request.method,
        "url": request.path,
        "content": request.body,
        "headers": {} if request.body is None else {"content-type": "application/json"},
        "extensions": {"timeout": _TimeLeft(deadline_s)},
    }


@contextmanager
def _http_failures() -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineExceeded("no answer in time", code="deadline_exceeded") from error
    except httpx.ConnectError as error:
        raise ConnectionFailed(f"cannot connect: {error}", never_sent=True) from error
    except httpx.TransportError as error:
        raise ConnectionFailed(f"the connection broke: {error!r}", never_sent=False) from error
    except httpx.HTTPError as error:
        raise BadReply(f"not an answer of the service: {error}") from error


class _Http:
    def __init__(self, server: Server) -> None:
        self._client = httpx.Client(**_http_options(server))

    def send(self, operation: Operation[Any], deadline_s: float) -> Any:
        call = _http_call(operation, deadline_s)
        with _http_failures():
            response = self._client.request(**call)
        return rest.result_of(operation, response.status_code, response.headers, response.content)

    def close(self) -> None:
        self._client.close()


class _AsyncHttp:
    def __init__(self, server: Server) -> None:
        self._client = httpx.AsyncClient(**_http_options(server))

    async def send(self, operation: Operation[Any], deadline_s: float) -> Any:
        call = _http_call(operation, deadline_s)
        with _http_failures():
            response = await self._client.request(**call)
        return rest.result_of(operation, response.status_code, response.headers, response.content)

    async def close(self) -> None:
        await self._client.aclose()
