"""What operators and their tools ask: probes, metrics, and to look for new versions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from nann.service.health import Health
from nann.service.http_api import docs
from nann.service.http_api.call import Call, Routes, json_response
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService

__all__ = ["operations_router"]


def operations_router(
    service: RetrievalService, routes: Routes, health: Health, metrics: Metrics
) -> APIRouter:
    """The routes of operation."""
    router = APIRouter()

    @router.get("/livez", tags=["operation"], **docs.PROBE)
    async def livez() -> Response:
        """200 as long as the process answers at all; depends on no model, device or queue."""
        return json_response({"status": "alive"})

    @router.get("/readyz", tags=["operation"], **docs.PROBE)
    async def readyz() -> Response:
        """200 when requests may be sent here, 503 while loading, impaired or draining."""
        return json_response({"status": health.state.value}, 200 if health.ready else 503)

    @router.get("/healthz", tags=["operation"], **docs.PROBE)
    async def healthz() -> Response:
        """As /readyz, with the models and which of them are impaired."""
        body = {
            "status": health.state.value,
            "models": list(service.models()),
            "impaired_models": sorted(health.impaired_models),
        }
        return json_response(body, 200 if health.ready else 503)

    @router.get("/metrics", tags=["operation"], **docs.METRICS)
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        content, content_type = metrics.render()
        return Response(content, headers={"content-type": content_type})

    @router.post("/models/rescan", tags=["operation"], **docs.RESCAN)
    async def rescan(request: Request) -> Response:
        """Look for new versions now; answers when they are served, or have failed."""
        return await routes.answer(request, "rescan", rescan_call)

    async def rescan_call(_call: Call) -> Any:
        await service.rescan_models()
        return {
            "models": {name: list(map(asdict, service.version_status(name))) for name in service.models()}
        }

    return router
