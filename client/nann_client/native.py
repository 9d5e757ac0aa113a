"""Operations as gRPC messages, and messages and statuses as results. Nothing here sends anything."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nann_client.errors import (
    BadReply,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidQuery,
    NannError,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ServerError,
    Unauthenticated,
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
from nann_client.pb import MODEL_SERVICE, RETRIEVAL_SERVICE, method_types
from nann_client.rest import plain_id
from nann_client.types import Id, Item, Note, Query, Reply, User, VersionStatus

__all__ = ["REQUEST_ID_KEY", "error_of", "path_of", "request_of", "result_of"]

REQUEST_ID_KEY: Final = "x-request-id"
_ERROR_CODE_KEY: Final = "nann-error-code"
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
_INT64: Final = range(-(2**63), 2**63)
# What grpcio answers for a server that has more calls than it may (its server.pyx.pxi).
_TOO_MANY_CALLS: Final = "Concurrent RPC limit exceeded"
# How gRPC's core says that there was no connection to send anything over. Should the words change, a
# call that could be tried again is not, and nothing worse.
_NEVER_CONNECTED: Final = ("failed to connect", "connections to all backends failing", "empty address list")

_METHODS: Final[dict[type[Operation[Any]], tuple[str, str]]] = {
    Retrieve: (RETRIEVAL_SERVICE, "Retrieve"),
    RetrieveMany: (RETRIEVAL_SERVICE, "BatchRetrieve"),
    RecordEvents: (RETRIEVAL_SERVICE, "RecordEvents"),
    GetUser: (RETRIEVAL_SERVICE, "GetUser"),
    DeleteUser: (RETRIEVAL_SERVICE, "DeleteUser"),
    ModelStatus: (MODEL_SERVICE, "GetModelStatus"),
}
_TYPES: Final = {kind: method_types(*method) for kind, method in _METHODS.items()}

# What a status without a code of ours means: that of gRPC itself, or of a proxy.
_BY_STATUS: Final[dict[str, type[NannError]]] = {
    "INVALID_ARGUMENT": InvalidQuery,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": Unsupported,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "RESOURCE_EXHAUSTED": PayloadTooLarge,
}


def path_of(operation: Operation[Any]) -> str:
    """The full name of the method, as gRPC wants it."""
    return "/{}/{}".format(*_METHODS[type(operation)])


def request_of(operation: Operation[Any]) -> bytes:
    """The request message; raises InvalidQuery for a value that has no place in it."""
    message = _TYPES[type(operation)][0]()
    try:
        _fill(operation, message)
        serialized: bytes = message.SerializeToString()
    except (TypeError, ValueError) as error:
        raise InvalidQuery(f"this has no form in protobuf: {error}", code="invalid_query") from error
    return serialized


def _fill(operation: Operation[Any], message: Any) -> None:
    match operation:
        case Retrieve(query):
            _fill_query(query, message)
        case RetrieveMany(queries):
            for query in queries:
                _fill_query(query, message.queries.add())
        case RecordEvents(user_id, item_ids):
            _fill_id(user_id, message.user_id)
            _fill_ids(item_ids, message.item_ids)
        case GetUser(user_id, model):
            _fill_id(user_id, message.user_id)
            message.model = model or ""
        case DeleteUser(user_id):
            _fill_id(user_id, message.user_id)
        case ModelStatus(model, version):
            message.model_spec.name = model
            if version is not None:
                message.model_spec.version.value = version


def _fill_query(query: Query, message: Any) -> None:
    if query.user_id is not None:
        _fill_id(query.user_id, message.user_id)
    if query.history is not None:
        message.history.SetInParent()  # an empty history is one, too
        _fill_ids(query.history, message.history.ids)
    if query.comm_seq is not None:
        message.comm_seq.SetInParent()
        for row in query.comm_seq:
            message.comm_seq.values.extend(float(number) for number in row)
    for name in ("k", "version", "exclude_seen"):
        value = getattr(query, name)
        if value is not None:
            setattr(message, name, value)
    message.model = query.model or ""
    message.profile = query.profile or ""
    if query.params is not None:
        params = query.params
        for name in ("policy", "ef", "beam_width", "max_steps", "gate_width", "gate_margin"):
            value = getattr(params, name)
            if value is not None:
                setattr(message.params, name, value)
        message.params.level_topn.extend(operator.index(width) for width in params.level_topn or ())
    _fill_ids(query.include_ids, message.include_ids)
    _fill_ids(query.exclude_ids, message.exclude_ids)
    for name, value in (query.filter or {}).items():
        _fill_value(value, message.filter.entries[name])
    message.strict = query.strict
    message.explain = query.explain
    message.with_attributes = query.with_attributes


def _fill_id(value: Id, message: Any) -> None:
    value = plain_id(value)
    if isinstance(value, str):
        message.text = value
    else:
        message.number = value


def _fill_ids(values: Iterable[Id], messages: Any) -> None:
    for value in values:
        _fill_id(value, messages.add())


def _fill_value(value: Any, message: Any) -> None:
    match value:
        case None:
            message.null_value = True
        case bool():
            message.bool_value = value
        case int() if value in _INT64:
            message.int_value = value
        case int() | float():
            message.double_value = value
        case str():
            message.string_value = value
        case Mapping():
            message.map_value.SetInParent()
            for name, element in value.items():
                _fill_value(element, message.map_value.entries[name])
        case list() | tuple():
            message.list_value.SetInParent()
            for element in value:
                _fill_value(element, message.list_value.values.add())
        case _:
            raise TypeError(f"no wire form for a value of type {type(value).__name__}")


def result_of(operation: Operation[Any], content: bytes, metadata: Mapping[str, str]) -> Any:
    """The result of an operation; raises BadReply for bytes that are no reply to it."""
    request_id = metadata.get(REQUEST_ID_KEY)
    try:
        message = _TYPES[type(operation)][1].FromString(content)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise BadReply("not an answer of the service", request_id=request_id) from error
    match operation:
        case Retrieve():
            return _reply(message, request_id)
        case RetrieveMany(queries):
            if len(message.results) != len(queries):
                raise BadReply("not one result a query", request_id=request_id)
            return [_outcome(result, request_id) for result in message.results]
        case RecordEvents():
            return message.recorded
        case GetUser():
            history = tuple(_id(item_id) for item_id in message.history)
            return User(_id(message.user_id), history, message.n_base, message.n_live)
        case DeleteUser():
            return None
        case ModelStatus():
            return [_version(status) for status in message.model_version_status]
    raise AssertionError(f"no result for {operation}")


def error_of(status: str, details: str, metadata: Mapping[str, str]) -> NannError:
    """The error of a call that ended with `status` (``NOT_FOUND``) and this trailing metadata."""
    request_id = metadata.get(REQUEST_ID_KEY)
    code = metadata.get(_ERROR_CODE_KEY)
    if code is None and status == "UNAVAILABLE":
        return ConnectionFailed(details, never_sent=details.startswith(_NEVER_CONNECTED))
    if code is None and details.startswith(_TOO_MANY_CALLS):
        return Overloaded(details, code="overloaded", request_id=request_id)
    pushback_ms = metadata.get(_PUSHBACK_KEY, "")
    return error_of_code(
        code or status.lower(),
        details,
        otherwise=_BY_STATUS.get(status, ServerError),
        request_id=request_id,
        retry_after_s=int(pushback_ms) / 1e3 if pushback_ms.isdigit() else None,
    )


def _outcome(message: Any, request_id: str | None) -> Reply | NannError:
    if message.WhichOneof("outcome") == "error":
        return error_of_code(message.error.code, message.error.message, request_id=request_id)
    return _reply(message.response, request_id)


def _reply(message: Any, request_id: str | None) -> Reply:
    return Reply(
        items=tuple(Item(_id(hit.item_id), hit.score, _mapping(hit.attributes)) for hit in message.items),
        model=message.model,
        version=message.version,
        n_scored=message.n_scored,
        timings_ms=dict(message.timings_ms),
        notes=tuple(Note(note.code, note.message, note.count) for note in message.notes),
        explain=_mapping(message.explain),
        request_id=request_id,
    )


def _id(message: Any) -> Id:
    value: Id = getattr(message, message.WhichOneof("id") or "number")
    return value


def _mapping(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in entries.items()}


def _value(message: Any) -> Any:
    match kind := message.WhichOneof("kind"):
        case None | "null_value":
            return None
        case "list_value":
            return [_value(value) for value in message.list_value.values]
        case "map_value":
            return _mapping(message.map_value.entries)
        case _:
            return getattr(message, kind)


def _version(message: Any) -> VersionStatus:
    descriptor = message.DESCRIPTOR.fields_by_name
    state = descriptor["state"].enum_type.values_by_number[message.state].name
    codes = message.status.DESCRIPTOR.fields_by_name["error_code"].enum_type.values_by_number
    return VersionStatus(
        message.version, state, codes[message.status.error_code].name, message.status.error_message
    )
