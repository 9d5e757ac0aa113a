"""What /docs and /openapi.json say of the routes: request and reply schemas, and examples that work.

The routes read their bodies themselves (limits and error bodies are ours), so their schemas are put
into the document here. The reply models describe; `wire/rest_json.py` builds, and a test compares.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.json_schema import models_json_schema

from nann.service.wire.rest_json import BatchBody, EventsBody, RetrieveBody

__all__ = [
    "DELETE_USER",
    "GET_USER",
    "METRICS",
    "PROBE",
    "RECORD_EVENTS",
    "RESCAN",
    "RETRIEVE",
    "use_own_openapi",
]

_COMPONENT: Final = "#/components/schemas/{model}"


class ItemReply(BaseModel):
    """One retrieved item; a higher score is better."""

    item_id: int | str
    score: float
    attributes: dict[str, JsonValue] | None = Field(
        None, description="What the model knows of the item; left out with `with_attributes` false."
    )


class NoteReply(BaseModel):
    """Something the caller should know about the answer, under a stable code."""

    code: str
    message: str
    count: int


class RetrieveReplyBody(BaseModel):
    """The answer to one query, best item first."""

    model_config = ConfigDict(protected_namespaces=())

    items: list[ItemReply]
    model: str
    version: int
    n_scored: int = Field(description="Items that the model scored for this query.")
    timings_ms: dict[str, float] = Field(description="Where the time went: queue, search, total.")
    notes: list[NoteReply]
    explain: dict[str, JsonValue] | None = Field(None, description="With `explain` only.")


class ErrorDetail(BaseModel):
    """What went wrong; `code` is stable, `message` is for people."""

    code: str
    message: str
    request_id: str


class ErrorReply(BaseModel):
    """The body of every error on native paths."""

    error: ErrorDetail


class BatchReplyBody(BaseModel):
    """A reply or an error for each query, in order."""

    results: list[RetrieveReplyBody | ErrorReply]


class UserReply(BaseModel):
    """What is known of a user: the model's base history, then the live events, newest last."""

    user_id: int | str
    history: list[int | str]
    n_base: int
    n_live: int


class EventsReply(BaseModel):
    """How many events are now durable."""

    user_id: int | str
    recorded: int


class DeletedReply(BaseModel):
    """The user is forgotten."""

    user_id: int | str
    deleted: bool


_REQUEST_MODELS: Final = (RetrieveBody, BatchBody, EventsBody)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    words = {
        400: "The body is not JSON.",
        404: "No such model, version or user.",
        413: "The body is larger than the server reads.",
        415: "The body is not declared as JSON.",
        422: "The query breaks a rule; the message says which.",
        429: "Too many queries wait; Retry-After says when to come back.",
        503: "The model is not ready, or its device failed.",
        504: "The deadline passed.",
    }
    return {status: {"model": ErrorReply, "description": words[status]} for status in statuses}


def _body(schema: dict[str, Any], examples: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {
                        name: {"summary": summary, "value": value}
                        for name, (summary, value) in examples.items()
                    },
                }
            },
        }
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _COMPONENT.format(model=model.__name__)}


_RETRIEVE_EXAMPLES: Final[dict[str, tuple[str, Any]]] = {
    "user": ("A user the service knows", {"user_id": 1, "k": 10}),
    "history": (
        "A history, without what it holds, and with how the search went",
        {"history": [1, 2, 3], "k": 10, "exclude_seen": True, "explain": True},
    ),
    "filtered": (
        "Only some items",
        {
            "history": [1, 2, 3],
            "k": 10,
            "filter": {"category": {"in": [1, 2]}},
            "exclude_ids": [5],
            "with_attributes": True,
        },
    ),
    "effort": (
        "More effort for more recall",
        {
            "user_id": 1,
            "k": 100,
            "params": {"policy": "best_first", "ef": 800, "beam_width": 64, "max_steps": 64},
        },
    ),
    "level": (
        "NANN's own served search",
        {"user_id": 1, "params": {"level_topn": [100, 200, 200, 200, 200, 200]}},
    ),
    "batch": (
        "Several users in one call",
        {"queries": [{"user_id": 1, "k": 5}, {"history": [7, 8], "k": 5}]},
    ),
}

RETRIEVE: Final[dict[str, Any]] = {
    "openapi_extra": _body({"oneOf": [_ref(RetrieveBody), _ref(BatchBody)]}, _RETRIEVE_EXAMPLES),
    "responses": {
        200: {"model": RetrieveReplyBody | BatchReplyBody, "description": "The best items, best first."},
        **_errors(400, 404, 413, 415, 422, 429, 503, 504),
    },
}
RECORD_EVENTS: Final[dict[str, Any]] = {
    "openapi_extra": _body(_ref(EventsBody), {"clicks": ("Three clicks", {"item_ids": [10, 11, 12]})}),
    "responses": {
        200: {"model": EventsReply, "description": "Stored."},
        **_errors(400, 413, 415, 422, 503),
    },
}
GET_USER: Final[dict[str, Any]] = {
    "responses": {200: {"model": UserReply, "description": "The history."}, **_errors(404, 422, 503)}
}
DELETE_USER: Final[dict[str, Any]] = {
    "responses": {200: {"model": DeletedReply, "description": "Forgotten."}, **_errors(404, 422, 503)}
}
PROBE: Final[dict[str, Any]] = {
    "responses": {
        200: {"description": "Yes.", "content": {"application/json": {"example": {"status": "ready"}}}}
    }
}
METRICS: Final[dict[str, Any]] = {
    "responses": {200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}}
}
RESCAN: Final[dict[str, Any]] = {
    "responses": {
        200: {
            "description": "Done; the state of every version.",
            "content": {
                "application/json": {
                    "example": {
                        "models": {
                            "nann": [
                                {"version": 2, "state": "AVAILABLE", "error_code": "OK", "error_message": ""}
                            ]
                        }
                    }
                }
            },
        },
        **_errors(503),
    }
}


def use_own_openapi(app: FastAPI) -> None:
    """Make `app` serve its OpenAPI document with the schemas of the bodies that the routes read."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in _REQUEST_MODELS], ref_template=_COMPONENT
            )
            document["components"]["schemas"].update(definitions["$defs"])
            # For the page's own button, where the server has keys; where it has none, none is needed.
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
