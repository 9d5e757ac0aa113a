"""The way past the router, for the paths that almost every request takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["DirectPaths"]

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectPaths:
    """ASGI middleware: answers the fixed paths of `router`, whose endpoints take the request and no more.

    FastAPI has them too, for its documentation and for wrong methods. Its routing, exit stacks and
    dependencies cost a request more processor time than everything between the body and the batcher, and
    such an endpoint makes use of none of them.
    """

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        self._app = app
        self._endpoints: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for route in router.routes
            if isinstance(route, APIRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
