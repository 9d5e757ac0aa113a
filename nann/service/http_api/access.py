"""Who may ask which path: refused before anything of the request but its head is read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers

from nann.engine.errors import RetrievalError
from nann.service.access import Access, Role, bearer_key
from nann.service.errors import Unauthenticated, error_row
from nann.service.http_api.call import error_response
from nann.service.http_api.tensorflow_serving import tensorflow_error_response
from nann.service.logs import caller_context
from nann.service.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Guard", "role_of"]

# They tell nothing but that the process is there, and whoever starts it has no key to ask with.
_ALWAYS_OPEN: Final = ("/livez", "/readyz")
_METRICS: Final = ("/metrics", "/healthz")
_DOCS: Final = ("/docs", "/openapi.json")
_DOCS_ASSETS: Final = "/docs-assets/"
_TENSORFLOW: Final = "/v1/"


def role_of(method: str, path: str, access: Access) -> Role | None:
    """What a request needs; None: nothing. A path that nobody has thought of needs a key like any other."""
    if path in _ALWAYS_OPEN:
        return None
    if path in _METRICS:
        return None if access.open_metrics else Role.METRICS
    if path in _DOCS or path.startswith(_DOCS_ASSETS):
        return None if access.open_docs else Role.READ
    if path.startswith("/models/"):
        return Role.ADMIN
    if path.startswith("/users/") and method not in ("GET", "HEAD"):
        return Role.WRITE
    return Role.READ


class Guard:
    """ASGI middleware: lets through what the caller's key allows."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = role_of(scope["method"], scope["path"], self._access)
        if needed is None:
            await self._app(scope, receive, send)
            return
        start_s = time.perf_counter()
        headers = Headers(scope=scope)
        try:
            caller = self._access.allow(
                bearer_key(headers.get("authorization"), headers.get("x-api-key")), needed
            )
        except RetrievalError as error:
            await self._refuse(error, start_s, scope, receive, send)
            return
        with caller_context(caller):
            await self._app(scope, receive, send)

    async def _refuse(
        self, error: RetrievalError, start_s: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        form = tensorflow_error_response if scope["path"].startswith(_TENSORFLOW) else error_response
        response = form(error, scope["state"]["request_id"])
        if isinstance(error, Unauthenticated):
            response.headers["www-authenticate"] = "Bearer"
        self._metrics.observe_request(
            api="rest",
            method="refused",
            model=None,
            code=error_row(error).code,
            duration_s=time.perf_counter() - start_s,
        )
        await response(scope, receive, send)
