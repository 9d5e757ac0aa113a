"""Both transports on loopback ports over the real service and a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import httpx
from fake_engine import PATIENCE_S, FakeEngine

from nann.service.access import open_access
from nann.service.grpc_api.server import create_server
from nann.service.health import Health
from nann.service.http_api.server import create_http_server
from nann.service.metrics import Metrics
from nann.service.pb import retrieval_pb2_grpc
from nann.service.registry import Registry
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.tls import open_tls
from nann.service.tracing import Tracing
from nann.service.user_store import MemoryUserStore, UserStore
from nann.service.wire import tf_messages

if TYPE_CHECKING:
    from nann.engine.search_engine import SearchEngine


class Transports:
    """A served model, an HTTP client and a gRPC channel to it."""

    def __init__(
        self,
        directory: Path,
        engine: FakeEngine,
        *,
        store: UserStore | None = None,
        load_engine: Callable[[Path], Any] | None = None,
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> None:
        version = str(engine.manifest.version)
        (directory / engine.manifest.model_name / version).mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.tracing = tracing
        self.settings = Settings(repository=directory, **{"rest_port": 0, "grpc_port": 0, **settings})
        self.health = Health()
        self.metrics = Metrics()
        self.registry = Registry(
            self.settings, self.metrics, load_engine or (lambda _path: cast("SearchEngine", engine))
        )
        self.service = RetrievalService(
            self.registry,
            store or MemoryUserStore(history_limit=self.settings.user_history_limit),
            self.settings,
            health=self.health,
            metrics=self.metrics,
        )
        self.grpc_port = 0
        self.http: httpx.AsyncClient
        self.channel: grpc.aio.Channel
        self.native: Any

    @contextlib.asynccontextmanager
    async def open(self, *, load: bool = True) -> AsyncIterator[Transports]:
        listener = socket.create_server(("127.0.0.1", 0))
        access, tls = open_access(self.settings, self.metrics), open_tls(self.settings, self.metrics)
        self.server = create_http_server(
            self.service, self.settings, self.health, self.metrics, access, tls, self.tracing
        )
        serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        grpc_server, self.grpc_port = create_server(
            self.service, self.settings, self.health, self.metrics, access, tls, self.tracing
        )
        await grpc_server.start()
        if load:
            await self.registry.load()
            self.health.loaded()
        self.address = listener.getsockname()
        url = f"http://127.0.0.1:{self.address[1]}"
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as self.http,
                grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as self.channel,
            ):
                self.native = retrieval_pb2_grpc.RetrievalServiceStub(self.channel)  # type: ignore[no-untyped-call]
                yield self
        finally:
            self.health.draining()
            self.server.should_exit = True
            await grpc_server.stop(None)
            await serving
            await self.registry.close()

    def tensorflow(self, service: str, method: str) -> Any:
        """A callable for a method of TensorFlow Serving's, with the private pool's messages."""
        request_class, reply_class = tf_messages.service_methods(service)[method]
        return self.channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=reply_class.FromString,
        )

    async def predict(self, request: Any, **call: Any) -> Any:
        return await self.tensorflow("tensorflow.serving.PredictionService", "Predict")(request, **call)

    async def raw(self, path: str, message: bytes) -> bytes:
        """Send bytes that need not be a message."""
        reply: bytes = await self.channel.unary_unary(path)(message)
        return reply
