"""TensorFlow Serving's REST API: status, metadata and Predict of models, versions and labels."""

from __future__ import annotations

import re
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from nann.engine.errors import InvalidQuery, Unsupported
from nann.service.http_api import tensorflow_docs as docs
from nann.service.http_api.call import Call, Routes, described, json_response
from nann.service.retrieval import RetrievalService
from nann.service.wire.tf_choice import ModelChoice, not_found_as, servable_not_found, versions_not_found
from nann.service.wire.tf_predict import predict_outputs, whole
from nann.service.wire.tf_rest import (
    body_of_metadata,
    body_of_outputs,
    body_of_statuses,
    encode_body,
    parse_body,
    predict_call_of_body,
)

__all__ = ["tensorflow_error_response", "tensorflow_router"]

_METHODS: Final = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_NOT_OFFERED: Final = re.compile(r"/v1/models/[^/:]+(?:/(?:versions/\d+|labels/[^/:]+))?:(classify|regress)")


def tensorflow_router(service: RetrievalService, routes: Routes) -> APIRouter:
    """The routes under ``/v1``, with TensorFlow Serving's error bodies."""
    router = APIRouter()

    async def status(request: Request, choice: ModelChoice) -> Response:
        async def answer(call: Call) -> Any:
            _check_name(request, choice)
            call.model = choice.name
            with not_found_as(versions_not_found(choice)):
                statuses = service.version_status(choice.name, version=choice.version, label=choice.label)
            return body_of_statuses(statuses)

        return await routes.answer(request, "model_status", answer, error_form=tensorflow_error_response)

    async def metadata(request: Request, choice: ModelChoice) -> Response:
        async def answer(call: Call) -> Any:
            _check_name(request, choice)
            call.model = choice.name
            with not_found_as(servable_not_found(choice)):
                found = service.metadata(choice.name, version=choice.version, label=choice.label)
            return body_of_metadata(found)

        return await routes.answer(request, "model_metadata", answer, error_form=tensorflow_error_response)

    async def predict(request: Request, choice: ModelChoice) -> Response:
        async def answer(call: Call) -> Any:
            _check_name(request, choice)
            call.model = choice.name
            with not_found_as(servable_not_found(choice)):
                lease = service.leased(choice.name, version=choice.version, label=choice.label)
            with lease as served:
                described = served.metadata
                asked, in_rows = predict_call_of_body(call.body, described)
                replies = whole(await service.retrieve_many(asked.requests, on=served))
            body = body_of_outputs(predict_outputs(asked, replies, described), in_rows=in_rows)
            # Only the padding of rows that fell short is not finite.
            finite = all(len(reply.hits.item_ids) == asked.k for reply in replies) or len(replies) == 1
            return Response(encode_body(body, finite=finite), media_type="application/json")

        return await routes.answer(
            request,
            "predict",
            answer,
            searches=True,
            parse=parse_body,
            error_form=tensorflow_error_response,
        )

    @router.get("/v1/models/{model}", tags=["TensorFlow Serving"], **docs.STATUS)
    async def model_status(request: Request, model: str) -> Response:
        """The state of every version of a model."""
        return await status(request, ModelChoice(model))

    @router.get("/v1/models/{model}/versions/{version:int}", tags=["TensorFlow Serving"], **docs.STATUS)
    async def version_status(request: Request, model: str, version: int) -> Response:
        """The state of one version of a model."""
        return await status(request, ModelChoice(model, version=version))

    @router.get("/v1/models/{model}/labels/{label}", tags=["TensorFlow Serving"], **docs.STATUS)
    async def label_status(request: Request, model: str, label: str) -> Response:
        """The state of the version that a label names."""
        return await status(request, ModelChoice(model, label=label))

    @router.get("/v1/models/{model}/metadata", tags=["TensorFlow Serving"], **docs.METADATA)
    async def model_metadata(request: Request, model: str) -> Response:
        """The signatures of a model's newest version."""
        return await metadata(request, ModelChoice(model))

    @router.get(
        "/v1/models/{model}/versions/{version:int}/metadata", tags=["TensorFlow Serving"], **docs.METADATA
    )
    async def version_metadata(request: Request, model: str, version: int) -> Response:
        """The signatures of one version."""
        return await metadata(request, ModelChoice(model, version=version))

    @router.get("/v1/models/{model}/labels/{label}/metadata", tags=["TensorFlow Serving"], **docs.METADATA)
    async def label_metadata(request: Request, model: str, label: str) -> Response:
        """The signatures of the version that a label names."""
        return await metadata(request, ModelChoice(model, label=label))

    @router.post("/v1/models/{model}:predict", tags=["TensorFlow Serving"], **docs.PREDICT)
    async def model_predict(request: Request, model: str) -> Response:
        """Predict by a model's newest version."""
        return await predict(request, ModelChoice(model))

    @router.post(
        "/v1/models/{model}/versions/{version:int}:predict", tags=["TensorFlow Serving"], **docs.PREDICT
    )
    async def version_predict(request: Request, model: str, version: int) -> Response:
        """Predict by one version."""
        return await predict(request, ModelChoice(model, version=version))

    @router.post("/v1/models/{model}/labels/{label}:predict", tags=["TensorFlow Serving"], **docs.PREDICT)
    async def label_predict(request: Request, model: str, label: str) -> Response:
        """Predict by the version that a label names."""
        return await predict(request, ModelChoice(model, label=label))

    @router.api_route("/v1/{rest:path}", methods=_METHODS, include_in_schema=False)
    async def malformed(request: Request, rest: str) -> Response:
        """Whatever else is under ``/v1``."""

        async def answer(_call: Call) -> Any:
            if request.method == "POST" and (method := _NOT_OFFERED.fullmatch(request.url.path)):
                raise Unsupported(f"{method[1]} is not offered here, only predict")
            raise _malformed(request)

        return await routes.answer(request, "unknown", answer, error_form=tensorflow_error_response)

    return router


def _check_name(request: Request, choice: ModelChoice) -> None:
    """A colon parts a name from a method, so what still has one is a path of no form."""
    if ":" in choice.name or ":" in (choice.label or ""):
        raise _malformed(request)


def _malformed(request: Request) -> InvalidQuery:
    return InvalidQuery(f"Malformed request: {request.method} {request.url.path}")


def tensorflow_error_response(error: BaseException, _request_id: str) -> Response:
    """TensorFlow Serving's error body with its status."""
    row, message = described(error)
    return json_response({"error": message}, row.tf_http_status)
