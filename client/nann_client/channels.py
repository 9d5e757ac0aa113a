"""Operations over gRPC, blocking and on an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from nann_client import native
from nann_client.operations import Operation

if TYPE_CHECKING:
    from nann_client.transports import Server

__all__ = ["BlockingChannel", "LoopChannel"]


def _credentials(server: Server) -> Any:
    """None for a channel without TLS."""
    if not server.url.startswith("grpcs"):
        return None
    roots = None if server.ca_file is None else Path(server.ca_file).read_bytes()
    chain, key = (
        (Path(path).read_bytes() for path in server.client_cert) if server.client_cert else (None, None)
    )
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=chain)


def _text(metadata: Iterable[Any] | None) -> dict[str, str]:
    return {name: value for name, value in metadata or () if isinstance(value, str)}


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        code, details, metadata = error.code(), error.details() or "", error.trailing_metadata()
        raise native.error_of(code.name, details, _text(metadata)) from error


class BlockingChannel:
    """A transport on grpcio's threads."""

    def __init__(self, server: Server, options: Sequence[tuple[str, int]]) -> None:
        credentials = _credentials(server)
        self._channel = (
            grpc.insecure_channel(server.target, options)
            if credentials is None
            else grpc.secure_channel(server.target, credentials, options)
        )
        self._metadata = server.metadata

    def send(self, operation: Operation[Any], deadline_s: float) -> Any:
        request = native.request_of(operation)
        method = self._channel.unary_unary(native.path_of(operation))
        with _failures():
            reply, call = method.with_call(
                request, timeout=deadline_s - time.monotonic(), metadata=self._metadata
            )
        return native.result_of(operation, reply, _text(call.trailing_metadata()))

    def close(self) -> None:
        self._channel.close()


class LoopChannel:
    """A transport on an event loop: the one that runs at the first call."""

    def __init__(self, server: Server, options: Sequence[tuple[str, int]]) -> None:
        self._server = server
        self._options = options
        self._channel: Any = None

    def _open(self) -> Any:
        if self._channel is None:
            credentials = _credentials(self._server)
            self._channel = (
                grpc.aio.insecure_channel(self._server.target, self._options)
                if credentials is None
                else grpc.aio.secure_channel(self._server.target, credentials, self._options)
            )
        return self._channel

    async def send(self, operation: Operation[Any], deadline_s: float) -> Any:
        request = native.request_of(operation)
        method = self._open().unary_unary(native.path_of(operation))
        with _failures():
            call = method(request, timeout=deadline_s - time.monotonic(), metadata=self._server.metadata)
            reply = await call
            metadata = await call.trailing_metadata()
        return native.result_of(operation, reply, _text(metadata))

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
