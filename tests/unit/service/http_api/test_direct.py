"""Which requests go past the router, and that they are answered as it would answer them."""

from __future__ import annotations

from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request, Response

from nann.service.http_api.direct import DirectPaths


def _app() -> FastAPI:
    router = APIRouter()

    @router.post("/fixed")
    async def fixed(request: Request) -> Response:
        past = "fastapi_middleware_astack" not in request.scope  # FastAPI puts it there
        return Response(f"{await request.body()!r} {past}")

    @router.post("/of/{name}")
    async def named(request: Request, name: str) -> Response:
        return Response(name)

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(DirectPaths, router=router)
    return app


async def _ask(method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(_app()), base_url="http://x") as client:
        return await client.request(method, path, **more)


async def test_a_fixed_path_goes_past_the_router() -> None:
    assert (await _ask("POST", "/fixed?a=1", content=b"body")).text == "b'body' True"


async def test_all_else_goes_through_it() -> None:
    assert (await _ask("POST", "/of/somebody")).text == "somebody"
    assert (await _ask("GET", "/fixed")).status_code == 405
    assert (await _ask("POST", "/nowhere")).status_code == 404
