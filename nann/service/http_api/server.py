"""The REST server: uvicorn, with our limits and certificates and without its signal handlers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import uvicorn
from typing_extensions import override

from nann.service.access import Access
from nann.service.health import Health
from nann.service.http_api.app import create_app
from nann.service.http_api.connection import Limits, limited_connection
from nann.service.http_api.turnstile import Turnstile
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.tls import Tls
from nann.service.tracing import Tracing

__all__ = ["HttpServer", "create_http_server"]

# Above the idle timeout of common proxies (60 s), so that it is they who close an idle connection;
# the other way round they lose requests to a connection that closes under them.
_KEEP_ALIVE_S = 75


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: ours end both transports together."""

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_http_server(
    service: RetrievalService,
    settings: Settings,
    health: Health,
    metrics: Metrics,
    access: Access | None = None,
    tls: Tls | None = None,
    tracing: Tracing | None = None,
) -> HttpServer:
    """The server of the application; give ``serve`` the sockets to listen on."""
    app = create_app(service, settings, health, metrics, access, tracing)
    # A refusal that is traced needs a span, and goes the long way.
    refusal_of = (
        Turnstile(service, access, metrics, access_log=settings.access_log).refusal
        if tracing is None
        else lambda _method, _target, _headers: None
    )
    limits = Limits(settings.max_connections, settings.max_header_bytes, settings.client_timeout_s)
    return HttpServer(
        uvicorn.Config(
            app,
            http=limited_connection(limits, metrics.connection_refused, refusal_of),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Nobody in front of us is known, so nobody may say that a caller is somebody else.
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_grace_s),
            ssl_context_factory=None if tls is None else lambda _config, _default: tls.server_context,
        )
    )
