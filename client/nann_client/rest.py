"""Operations as HTTP requests, and HTTP responses as results. Nothing here sends anything."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote

from nann_client.errors import (
    BadReply,
    DeadlineExceeded,
    InvalidQuery,
    NannError,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ServerError,
    Unauthenticated,
    Unavailable,
    Unsupported,
    error_of_code,
)
from nann_client.operations import (
    DeleteUser,
    GetUser,
    ModelStatus,
    Operation,
    RecordEvents,
    Retrieve,
    RetrieveMany,
)
from nann_client.types import Id, Item, Note, Query, Reply, SearchParams, User, VersionStatus

__all__ = ["HttpRequest", "request_of", "result_of"]

# What an answer without a code of ours means: that of a proxy, or of TensorFlow Serving's paths.
_BY_STATUS: Final[dict[int, type[NannError]]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    413: PayloadTooLarge,
    429: Overloaded,
    501: Unsupported,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}
_BY_HUNDREDS: Final[dict[int, type[NannError]]] = {4: InvalidQuery, 5: ServerError}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request; `path` is escaped, `body` is JSON or nothing."""

    method: str
    path: str
    body: bytes | None = None


def request_of(operation: Operation[Any], timeout_s: float) -> HttpRequest:
    """The request of an operation that may take `timeout_s`; raises InvalidQuery for what is not JSON."""
    try:
        return _request(operation, timeout_s)
    except (TypeError, ValueError) as error:
        raise InvalidQuery(f"this has no form in JSON: {error}", code="invalid_query") from error


def _request(operation: Operation[Any], timeout_s: float) -> HttpRequest:
    match operation:
        case Retrieve(query):
            return HttpRequest("POST", "/retrieve", _json(_query(query, timeout_s)))
        case RetrieveMany(queries):
            body = {"queries": [_query(query, timeout_s) for query in queries]}
            return HttpRequest("POST", "/retrieve", _json(body))
        case RecordEvents(user_id, item_ids):
            path = f"/users/{_segment(user_id)}/events"
            return HttpRequest("POST", path, _json({"item_ids": _ids(item_ids)}))
        case GetUser(user_id, model):
            chosen = "" if model is None else f"?model={quote(model, safe='')}"
            return HttpRequest("GET", f"/users/{_segment(user_id)}{chosen}")
        case DeleteUser(user_id):
            return HttpRequest("DELETE", f"/users/{_segment(user_id)}")
        case ModelStatus(model, version):
            chosen = "" if version is None else f"/versions/{version}"
            return HttpRequest("GET", f"/v1/models/{_segment(model)}{chosen}")
    raise AssertionError(f"no request for {operation}")


def result_of(operation: Operation[Any], status: int, headers: Mapping[str, str], content: bytes) -> Any:
    """The result of an operation; raises the NannError that the response stands for."""
    request_id = headers.get("x-request-id")
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not 200 <= status < 300:
        raise _error(status, headers, body, request_id)
    try:
        return _result(operation, body, request_id)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"not an answer of the service: {content[:200]!r}", request_id=request_id) from error


def plain_id(value: Id) -> Id:
    """`value` as a Python integer or text, also where it is a NumPy integer; TypeError for anything else."""
    return value if isinstance(value, str) else operator.index(value)


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False).encode()


def _segment(value: Id) -> str:
    # A name of dots alone would be read as a step in the path.
    return quote(str(plain_id(value)), safe="").replace(".", "%2E")


def _query(query: Query, timeout_s: float) -> dict[str, Any]:
    """What differs from the server's defaults; and the time, which a REST call has no other place for."""
    body: dict[str, Any] = {
        "user_id": None if query.user_id is None else plain_id(query.user_id),
        "history": None if query.history is None else _ids(query.history),
        "comm_seq": None if query.comm_seq is None else [[float(x) for x in row] for row in query.comm_seq],
        "k": None if query.k is None else operator.index(query.k),
        "model": query.model,
        "version": None if query.version is None else operator.index(query.version),
        "params": None if query.params is None else _params(query.params),
        "profile": query.profile,
        "include_ids": _ids(query.include_ids) or None,
        "exclude_ids": _ids(query.exclude_ids) or None,
        "filter": None if query.filter is None else dict(query.filter),
        "exclude_seen": query.exclude_seen,
        "strict": query.strict or None,
        "explain": query.explain or None,
        "with_attributes": None if query.with_attributes else False,
        "timeout_ms": timeout_s * 1e3,
    }
    return {name: value for name, value in body.items() if value is not None}


def _params(params: SearchParams) -> dict[str, Any]:
    given = {field.name: getattr(params, field.name) for field in fields(params)}
    if params.level_topn is not None:
        given["level_topn"] = [operator.index(width) for width in params.level_topn]
    return {name: value for name, value in given.items() if value is not None}


def _ids(values: Sequence[Id]) -> list[Id]:
    return [plain_id(value) for value in values]


def _error(status: int, headers: Mapping[str, str], body: Any, request_id: str | None) -> NannError:
    otherwise = _BY_STATUS.get(status) or _BY_HUNDREDS.get(status // 100, BadReply)
    detail = body.get("error") if isinstance(body, dict) else None
    retry_after_s = _retry_after_s(headers.get("retry-after"))
    if isinstance(detail, dict):
        return error_of_code(
            str(detail.get("code", "")),
            str(detail.get("message", "")),
            otherwise=otherwise,
            request_id=detail.get("request_id", request_id),
            retry_after_s=retry_after_s,
        )
    message = detail if isinstance(detail, str) else f"HTTP status {status}"
    return otherwise(message, request_id=request_id, retry_after_s=retry_after_s)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds, or a date (RFC 9110); None for neither."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _result(operation: Operation[Any], body: Any, request_id: str | None) -> Any:
    match operation:
        case Retrieve():
            return _reply(body, request_id)
        case RetrieveMany(queries):
            results = [_outcome(result, request_id) for result in body["results"]]
            if len(results) != len(queries):
                raise ValueError("not one result a query")
            return results
        case RecordEvents():
            return int(body["recorded"])
        case GetUser():
            return User(body["user_id"], tuple(body["history"]), body["n_base"], body["n_live"])
        case DeleteUser():
            return None
        case ModelStatus():
            return [_version(status) for status in body["model_version_status"]]
    raise AssertionError(f"no result for {operation}")


def _outcome(body: Any, request_id: str | None) -> Reply | NannError:
    if "error" in body:
        detail = body["error"]
        return error_of_code(detail["code"], detail["message"], request_id=request_id)
    return _reply(body, request_id)


def _reply(body: Any, request_id: str | None) -> Reply:
    items: Sequence[Any] = body["items"]
    return Reply(
        items=tuple(Item(i["item_id"], float(i["score"]), i.get("attributes") or {}) for i in items),
        model=body["model"],
        version=body["version"],
        n_scored=body["n_scored"],
        timings_ms=body["timings_ms"],
        notes=tuple(Note(note["code"], note["message"], note["count"]) for note in body["notes"]),
        explain=body.get("explain") or {},
        request_id=request_id,
    )


def _version(body: Any) -> VersionStatus:
    status = body["status"]
    return VersionStatus(int(body["version"]), body["state"], status["error_code"], status["error_message"])
