"""The REST application: middleware, routes, and the documentation page."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from nann.engine.errors import RetrievalError
from nann.service.access import Access
from nann.service.errors import InternalError
from nann.service.health import Health, HealthState
from nann.service.http_api.access import Guard
from nann.service.http_api.call import Routes, error_response, json_response
from nann.service.http_api.direct import DirectPaths
from nann.service.http_api.docs import use_own_openapi
from nann.service.http_api.operations import operations_router
from nann.service.http_api.retrieval import retrieval_router
from nann.service.http_api.tensorflow_serving import tensorflow_router
from nann.service.logs import get_logger, request_context
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.tracing import Tracing
from nann.service.wire.checks import request_id_of
from nann.service.wire.rest_json import body_of_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["create_app"]

REQUEST_ID_HEADER: Final = b"x-request-id"
TRACEPARENT_HEADER: Final = b"traceparent"
# Whoever asks again should ask elsewhere.
_CLOSE: Final = (b"connection", b"close")
_ASSETS_PATH: Final = "/docs-assets"
_DESCRIPTION: Final = (
    "Retrieval with the deep model itself as the similarity. Every answer carries the header "
    "`x-request-id`: the caller's own, or one made up."
)
_HTTP_CODES: Final = {404: "not_found", 405: "method_not_allowed"}

log = get_logger(__name__)


def create_app(
    service: RetrievalService,
    settings: Settings,
    health: Health,
    metrics: Metrics,
    access: Access | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application of REST; it owns nothing, and needs no lifespan events."""
    app = FastAPI(
        title="NANN retrieval",
        version=version("nann"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    routes = Routes(metrics, settings.max_body_bytes, settings.access_log, service, tracing)
    retrieval = retrieval_router(service, routes)
    app.include_router(retrieval)
    app.include_router(operations_router(service, routes, health, metrics))
    app.include_router(tensorflow_router(service, routes))
    _add_docs(app)
    use_own_openapi(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(DirectPaths, router=retrieval)
    if access is not None and not access.is_open:
        app.add_middleware(Guard, access=access, metrics=metrics)
    app.add_middleware(_RequestScope, health=health)
    return app


def _add_docs(app: FastAPI) -> None:
    """/docs with its scripts from our own process: no content delivery network, no internet needed."""
    spec = importlib.util.find_spec("fastapi_offline")
    assert spec is not None and spec.origin is not None, "fastapi-offline is a dependency of this package"
    app.mount(_ASSETS_PATH, StaticFiles(directory=Path(spec.origin).parent / "static"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{_ASSETS_PATH}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS_PATH}/swagger-ui.css",
            swagger_favicon_url=f"{_ASSETS_PATH}/favicon.png",
        )


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors of routing (no such path, wrong method) in the native error body."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    body = body_of_error(
        code, f"{request.method} {request.url.path}: {error.detail}"[:1024], request.state.request_id
    )
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


class _RequestScope:
    """Gives every request its id, in the log, the answer and `request.state`; the last resort for bugs.

    Answers of a server that is going away close their connections.
    """

    def __init__(self, app: ASGIApp, health: Health) -> None:
        self._app = app
        self._health = health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"])
        request_id = request_id_of(_text(sent.get(REQUEST_ID_HEADER)))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]
                if self._health.state is HealthState.DRAINING:
                    message["headers"].append(_CLOSE)
            await send(message)

        with request_context(request_id, _text(sent.get(TRACEPARENT_HEADER))):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                log.exception("request failed", path=scope["path"])
                if started:
                    raise
                failure = error if isinstance(error, RetrievalError) else InternalError(type(error).__name__)
                await error_response(failure, request_id)(scope, receive, send_with_id)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
