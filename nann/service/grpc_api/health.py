"""grpc.health.v1.Health over the process's own readiness.

Not the servicer of grpcio-health-checking: that one keeps a copy of the state, and its Watch streams
stay open through a shutdown, so that a server with one watching client would drain for its whole
grace period.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import override

from nann.service.grpc_api.call import or_invalid_argument
from nann.service.health import Health, HealthState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["HEALTH_SERVICE", "HealthApi"]

HEALTH_SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_Response = health_pb2.HealthCheckResponse


class HealthApi(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped base
    """Answers for the whole server (``""``) and for each of `services`; all share one readiness."""

    def __init__(self, health: Health, services: Iterable[str]) -> None:
        self._health = health
        self._services = frozenset(("", *services))
        self._changed = asyncio.Event()
        health.subscribe(self._announce)

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler of the service; the generated one answers bytes that are no message with UNKNOWN."""

        async def check(raw: bytes, context: grpc.aio.ServicerContext) -> health_pb2.HealthCheckResponse:
            request = await or_invalid_argument(context, health_pb2.HealthCheckRequest, raw)
            return await self.Check(request, context)

        async def watch(
            raw: bytes, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
            request = await or_invalid_argument(context, health_pb2.HealthCheckRequest, raw)
            async for response in self.Watch(request, context):
                yield response

        reply = {"response_serializer": _Response.SerializeToString}
        return grpc.method_handlers_generic_handler(
            HEALTH_SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(check, **reply),
                "Watch": grpc.unary_stream_rpc_method_handler(watch, **reply),
            },
        )

    def _announce(self, _ready: bool) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self) -> int:
        status: int = _Response.SERVING if self._health.ready else _Response.NOT_SERVING
        return status

    @override
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The present status; NOT_FOUND for a service that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:256]!r}")
        return _Response(status=self._status())

    @override
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and at each change; ends when the process drains."""
        known = request.service in self._services
        while True:
            changed = self._changed
            yield _Response(status=self._status() if known else _Response.SERVICE_UNKNOWN)
            if self._health.state is HealthState.DRAINING:
                return
            await changed.wait()
