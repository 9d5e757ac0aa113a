"""POST /retrieve and /users as JSON: the models of the request bodies, and the dicts of the replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    WithJsonSchema,
)

from nann.engine.errors import InvalidQuery, RetrievalError
from nann.service.errors import error_row
from nann.service.types import ParamOverrides, RetrieveRequest
from nann.service.wire.checks import bounded_message, finite_vector, parse_id

if TYPE_CHECKING:
    from nann.service.types import RetrieveReply, UserProfile

__all__ = [
    "BatchBody",
    "EventsBody",
    "MalformedJson",
    "RetrieveBody",
    "body_of_error",
    "body_of_reply",
    "body_of_results",
    "body_of_user",
    "events_of_body",
    "load_json",
    "requests_of_body",
    "validated",
]

_ID_SCHEMA: Final = {"anyOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]}


class MalformedJson(ValueError):
    """The body is not JSON at all (RFC 8259: NaN and Infinity are not JSON either)."""


def _check_id(value: Any) -> int | str:
    try:
        return parse_id(value, "id")
    except InvalidQuery as error:
        raise ValueError(str(error)) from None


def _check_ids(values: list[Any]) -> list[int | str]:
    # One pass in Python is faster than a pydantic union a value, and names the bad one in one line.
    try:
        return [parse_id(value, f"element {position}") for position, value in enumerate(values)]
    except InvalidQuery as error:
        raise ValueError(str(error)) from None


def _check_rows(rows: list[Any]) -> np.ndarray[Any, Any]:
    """An array of rows of numbers, flattened; every row as wide as the first."""
    flat: list[float] = []
    for position, row in enumerate(rows):
        if type(row) is not list:
            raise ValueError(f"row {position} is not an array of numbers")
        if len(row) != len(rows[0]):
            raise ValueError(f"row {position} has {len(row)} numbers, row 0 has {len(rows[0])}")
        if not set(map(type, row)) <= {int, float}:
            raise ValueError(f"row {position} holds something that is not a number")
        flat += row
    try:
        return finite_vector(np.array(flat, dtype=np.float64), "array")
    except InvalidQuery as error:
        raise ValueError(str(error)) from None


_Id = Annotated[Any, AfterValidator(_check_id), WithJsonSchema(_ID_SCHEMA)]
_Ids = Annotated[
    list[Any], AfterValidator(_check_ids), WithJsonSchema({"type": "array", "items": _ID_SCHEMA})
]
_Rows = Annotated[
    list[Any],
    AfterValidator(_check_rows),
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
]
_Int = StrictInt
_Number = Annotated[FiniteFloat, Field(strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ParamsBody(_Body):
    """How hard to search; what is left out comes from the profile. `level_topn` alone means policy level."""

    policy: StrictStr | None = Field(
        None, description="best_first, level, level_pruned, inner_product or exhaustive."
    )
    ef: _Int | None = Field(None, description="best_first: size of the pool of the best nodes seen so far.")
    beam_width: _Int | None = Field(None, description="best_first: pool entries expanded in each step.")
    max_steps: _Int | None = Field(None, description="best_first: at most so many steps.")
    gate_width: _Int | None = Field(
        None, description="best_first: at most so many items scored a step, chosen by the gate; 0: all."
    )
    gate_margin: _Number | None = Field(
        None, description="best_first: how far below the answer an estimate may lie, in its errors."
    )
    level_topn: list[_Int] | None = Field(None, description="level: NANN's six widths t0 … t5.")


class RetrieveBody(_Body):
    """One retrieval. Give exactly one of `user_id`, `history` and `comm_seq`."""

    user_id: _Id | None = Field(None, description="A user known to the live store or the model.")
    history: _Ids | None = Field(None, description="Item ids, oldest first; unknown ones are skipped.")
    comm_seq: _Rows | None = Field(
        None, description="NANN's embedded history: history_length rows of input_dim numbers, oldest first."
    )
    k: _Int | None = Field(None, description="Items wanted; 200 by default, or t5 with level_topn.")
    model: StrictStr | None = Field(None, description="By default the only model served.")
    version: _Int | None = Field(None, description="By default the newest that is loaded.")
    params: ParamsBody | None = None
    profile: StrictStr | None = Field(None, description="The model's measured settings, such as balanced.")
    include_ids: _Ids | None = Field(None, description="When not empty, only these may be returned.")
    exclude_ids: _Ids | None = Field(None, description="These are never returned.")
    filter: dict[str, JsonValue] | None = Field(
        None, description="Attribute -> value, array of values, or {operator: value}."
    )
    exclude_seen: StrictBool | None = Field(
        None, description="Leave out the user's own items; the default is a setting of the server."
    )
    timeout_ms: _Number | None = Field(None, description="Give up after this long (504).")
    strict: StrictBool = Field(False, description="Refuse unknown item ids instead of skipping them.")
    explain: StrictBool = Field(False, description="Add how the search went.")
    with_attributes: StrictBool = Field(
        True, description="Add each item's attributes; false for smaller replies."
    )


class BatchBody(_Body):
    """Several retrievals in one call; the results are in the order of the queries."""

    queries: list[RetrieveBody]


class EventsBody(_Body):
    """What a user has just interacted with."""

    item_ids: _Ids = Field(description="Item ids, oldest first.")


_ModelT = type[RetrieveBody] | type[BatchBody] | type[EventsBody]


def load_json(raw: bytes) -> Any:
    """The value of a JSON text; raises MalformedJson."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise MalformedJson(f"malformed JSON: {error}") from None


def validated(model: _ModelT, value: Any) -> Any:
    """`value` as an instance of `model`; raises InvalidQuery that names the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidQuery(_first_problem(error)) from None


def requests_of_body(value: Any) -> tuple[list[RetrieveRequest], bool]:
    """The retrievals of a JSON body, and whether it is the batch form; raises InvalidQuery."""
    if isinstance(value, dict) and "queries" in value:
        return [_request(query) for query in validated(BatchBody, value).queries], True
    return [_request(validated(RetrieveBody, value))], False


def events_of_body(value: Any) -> list[int | str]:
    """The item ids of an events body; raises InvalidQuery."""
    ids: list[int | str] = validated(EventsBody, value).item_ids
    return ids


def _request(body: RetrieveBody) -> RetrieveRequest:
    params = body.params
    return RetrieveRequest(
        user_id=body.user_id,
        history=body.history,
        comm_seq=body.comm_seq,  # type: ignore[arg-type]  # _check_rows made it an array
        k=body.k,
        model=body.model,
        version=body.version,
        params=None
        if params is None
        else ParamOverrides(
            policy=params.policy,  # type: ignore[arg-type]  # the service refuses any other word
            ef=params.ef,
            beam_width=params.beam_width,
            max_steps=params.max_steps,
            gate_width=params.gate_width,
            gate_margin=params.gate_margin,
            level_topn=None if params.level_topn is None else tuple(params.level_topn),
        ),
        profile=body.profile,
        include_ids=body.include_ids or None,
        exclude_ids=body.exclude_ids or (),
        filter=body.filter or None,
        exclude_seen=body.exclude_seen,
        timeout_ms=body.timeout_ms,
        strict=body.strict,
        explain=body.explain,
        with_attributes=body.with_attributes,
    )


def body_of_reply(reply: RetrieveReply, *, explain: bool = False) -> dict[str, Any]:
    """The JSON object of one reply, ready for orjson."""
    hits = reply.hits
    items: list[dict[str, Any]] = [
        {"item_id": item_id, "score": score}
        for item_id, score in zip(hits.item_ids, hits.scores, strict=True)
    ]
    if hits.attributes is not None:
        for item, attributes in zip(items, hits.attributes, strict=True):
            item["attributes"] = dict(attributes)
    body: dict[str, Any] = {
        "items": items,
        "model": reply.model,
        "version": reply.version,
        "n_scored": hits.n_scored,
        "timings_ms": dict(reply.timings_ms),
        "notes": [{"code": note.code, "message": note.message, "count": note.count} for note in reply.notes],
    }
    if explain:
        body["explain"] = {"steps": hits.steps, **hits.explain, **reply.explain}
    return body


def body_of_results(
    results: Sequence[RetrieveReply | RetrievalError], requests: Sequence[RetrieveRequest], request_id: str
) -> dict[str, Any]:
    """The batch reply: a reply or an error body for each query, in order."""
    return {
        "results": [
            body_of_error(error_row(result).code, bounded_message(result), request_id)
            if isinstance(result, RetrievalError)
            else body_of_reply(result, explain=request.explain)
            for result, request in zip(results, requests, strict=True)
        ]
    }


def body_of_error(code: str, message: str, request_id: str) -> dict[str, Any]:
    """The native error body."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def body_of_user(profile: UserProfile) -> dict[str, Any]:
    """The JSON object of a user's history."""
    return {
        "user_id": profile.user_id,
        "history": list(profile.history),
        "n_base": profile.n_base,
        "n_live": profile.n_live,
    }


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    where = _path(first["loc"])
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
