"""What operators and their tools ask: probes, metrics, and the state of models in TF Serving's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from nann.engine.errors import UnknownModel, UnknownVersion
from nann.service.errors import error_row
from nann.service.health import Health
from nann.service.http_api import docs
from nann.service.http_api.call import Call, Routes, json_response
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.wire.checks import bounded_message
from nann.service.wire.tf_predict import ModelChoice, versions_not_found

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

    @router.get("/v1/models/{model}", tags=["TensorFlow Serving"], **docs.MODEL_STATUS)
    async def model_status(request: Request, model: str) -> Response:
        """The state of every version of a model."""
        return await _status(request, ModelChoice(model, None, None))

    @router.get("/v1/models/{model}/versions/{version:int}", tags=["TensorFlow Serving"], **docs.MODEL_STATUS)
    async def version_status(request: Request, model: str, version: int) -> Response:
        """The state of one version of a model."""
        return await _status(request, ModelChoice(model, version, None))

    async def _status(request: Request, choice: ModelChoice) -> Response:
        async def status(call: Call) -> Any:
            call.model = choice.name
            return _status_body(service, choice)

        return await routes.answer(request, "model_status", status, error_form=_tensorflow_error)

    return router


def _status_body(service: RetrievalService, choice: ModelChoice) -> dict[str, Any]:
    try:
        statuses = service.version_status(choice.name, version=choice.version)
    except (UnknownModel, UnknownVersion) as error:
        raise type(error)(versions_not_found(choice)) from error
    return {
        "model_version_status": [
            {
                "version": str(status.version),
                "state": status.state,
                "status": {"error_code": status.error_code, "error_message": status.error_message},
            }
            for status in statuses
        ]
    }


def _tensorflow_error(error: BaseException, _request_id: str) -> Response:
    return json_response({"error": bounded_message(error)}, error_row(error).tf_http_status)
