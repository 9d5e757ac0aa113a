"""The gRPC server: which services it has, its limits, and where it listens."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from nann.service.access import Access
from nann.service.grpc_api import native, tensorflow_serving
from nann.service.grpc_api.access import AccessInterceptor
from nann.service.grpc_api.call import CallLimit, Methods
from nann.service.grpc_api.hang_up import hang_up
from nann.service.grpc_api.health import HEALTH_SERVICE, HealthApi
from nann.service.grpc_api.reflection import reflection_handler
from nann.service.health import Health
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.tls import Tls
from nann.service.tracing import Tracing

__all__ = ["create_server"]

_SERVICES = (native.SERVICE_NAME, tensorflow_serving.PREDICTION_SERVICE, tensorflow_serving.MODEL_SERVICE)
# The names under which TensorFlow Serving's own health service knows its services (server.cc).
_TENSORFLOW_HEALTH_NAMES = ("PredictionService", "ModelService")
_UNCOMPRESSED_ONLY = 1  # bit 0: identity (grpc/compression.h)
# Ends what a caller holds open without using it, and lets a balancer before several servers spread its
# connections anew. gRPC finishes the calls of such a connection and its clients open another.
_CONNECTION_AGE_MS = 30 * 60 * 1000
# Calls above the limit that are still heard: health, reflection, and those that are told of the overload.
# What comes above these gRPC refuses by itself, without a word of when to come back.
_RESERVED_CALLS = 64
# Calls that have come and that nobody has looked at. Above this, gRPC ends some of them with CANCELLED, which
# does not say that a caller may try again; by default it begins at 1,000, fewer than one connection may have.
_MOST_UNREAD_CALLS = 16_384


class GrpcServer:
    """A server of gRPC that ends without a word that its callers could take for an answer."""

    def __init__(self, server: grpc.aio.Server, port: int, in_progress: set[asyncio.Task[Any]]) -> None:
        self._server = server
        self._port = port
        self._in_progress = in_progress

    async def start(self) -> None:
        """Serve from now on."""
        await self._server.start()

    async def stop(self, grace_s: float | None) -> None:
        """Send the answers of what was accepted, for `grace_s` at most (None: do not wait), and close."""
        if grace_s is not None:
            until_s = asyncio.get_running_loop().time() + grace_s
            await self._finish(until_s)
        hang_up(self._port)
        await self._server.stop(None)

    async def _finish(self, until_s: float) -> None:
        if self._in_progress:
            await asyncio.wait(self._in_progress, timeout=until_s - asyncio.get_running_loop().time())


def create_server(
    service: RetrievalService,
    settings: Settings,
    health: Health,
    metrics: Metrics,
    access: Access | None = None,
    tls: Tls | None = None,
    tracing: Tracing | None = None,
) -> tuple[GrpcServer, int]:
    """The server, bound but not started, and its port (that of `settings`, or the one chosen for 0).

    Call it on the event loop that will run it. Raises OSError when the address is taken.
    """
    guarded = access is not None and not access.is_open
    server = grpc.aio.server(
        interceptors=[AccessInterceptor(access, metrics)] if guarded else None,  # type: ignore[arg-type]
        options=_options(settings),
        maximum_concurrent_rpcs=settings.grpc_calls_limit + _RESERVED_CALLS,
    )
    methods = Methods(
        metrics,
        access_log=settings.access_log,
        limit=CallLimit(settings.grpc_calls_limit),
        service=service,
        tracing=tracing,
    )
    tf_api = tensorflow_serving.TensorFlowServingApi(service)
    server.add_generic_rpc_handlers(
        (
            methods.handler(native.SERVICE_NAME, native.NativeApi(service).methods()),
            methods.handler(
                tensorflow_serving.PREDICTION_SERVICE, tf_api.prediction_methods(), tensorflow_codes=True
            ),
            methods.handler(tensorflow_serving.MODEL_SERVICE, tf_api.model_methods(), tensorflow_codes=True),
            HealthApi(health, (*_SERVICES, *_TENSORFLOW_HEALTH_NAMES)).handler(),
            reflection_handler((native.SERVICE_NAME, HEALTH_SERVICE)),
        )
    )
    port = _bind(server, settings.host, settings.grpc_port, tls)
    return GrpcServer(server, port, methods.in_progress), port


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # A few compressed bytes could be any amount of memory; nobody compresses queries by default.
        ("grpc.compression_enabled_algorithms_bitset", _UNCOMPRESSED_ONLY),
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.grpc_calls_limit + _RESERVED_CALLS),
        ("grpc.server.max_pending_requests", _MOST_UNREAD_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MOST_UNREAD_CALLS),
        ("grpc.server_handshake_timeout_ms", round(settings.client_timeout_s * 1e3)),
        ("grpc.max_connection_age_ms", _CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", round(settings.client_timeout_s * 1e3)),
        # Two servers on one port would share its requests without a word.
        ("grpc.so_reuseport", 0),
    ]


def _bind(server: grpc.aio.Server, host: str, port: int, tls: Tls | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound: int = (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, _credentials(tls))
        )
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}; choose another --grpc-port") from error
    return bound


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    given = tls.pem

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(given.key, given.cert)], tls.client_ca)

    def newer() -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each handshake; None: nothing has changed."""
        nonlocal given
        tls.refresh()
        if tls.pem is given:
            return None
        given = tls.pem
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), newer, require_client_authentication=tls.client_ca is not None
    )
