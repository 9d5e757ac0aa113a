"""What each failure looks like to a caller, for every transport, in one table.

    RetrievalError                    engine/errors.py draws the engine's part of the tree
    ├── …
    ├── InvalidQuery
    │   └── PayloadTooLarge           the message is larger than this server reads
    ├── UnknownSignature              TF Serving's Predict names a signature that is not served
    ├── Unauthenticated               no credential, or one nobody issued
    ├── PermissionDenied              a good credential that does not allow this
    ├── FailedPrecondition            well formed, but not in the present state of the models
    ├── NotEnoughMemory               a version would not fit beside those that serve
    └── InternalError                 a bug of ours: the log has it, the answer only its request id

gRPC codes are kept as names (``grpc.StatusCode[row.grpc_code]``), so that only the transports
import gRPC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from nann.engine.errors import (
    ArtifactError,
    BackendError,
    DeadlineExceeded,
    DeviceLost,
    InvalidQuery,
    NotFound,
    NotReady,
    Overloaded,
    RetrievalError,
    Unavailable,
    UnknownLabel,
    UnknownModel,
    UnknownUser,
    UnknownVersion,
    Unsupported,
)

__all__ = [
    "ERROR_TABLE",
    "INTERNAL",
    "ErrorRow",
    "FailedPrecondition",
    "InternalError",
    "NotEnoughMemory",
    "PayloadTooLarge",
    "PermissionDenied",
    "Unauthenticated",
    "UnknownSignature",
    "error_row",
    "fresh_error",
    "public_message",
    "retry_after_seconds",
]


class PayloadTooLarge(InvalidQuery):
    """The message is larger than ``max_body_bytes`` or ``max_message_bytes``; it was not read."""


class UnknownSignature(RetrievalError):
    """The signature a Predict request names does not exist or may not be called from outside."""


class Unauthenticated(RetrievalError):
    """The caller gave no credential, or one that is not valid."""


class PermissionDenied(RetrievalError):
    """The caller is known and not allowed to do this."""


class FailedPrecondition(RetrievalError):
    """A change of what is served asks for what is not so, such as a label on a version that is not loaded."""


class NotEnoughMemory(RetrievalError):
    """A version is not loaded because it would not fit into memory beside those that serve."""


class InternalError(RetrievalError):
    """A bug of ours. Its cause is logged and never sent; the caller gets the request id."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One failure on every transport; `code` is the stable word that native answers carry."""

    code: str
    http_status: int
    grpc_code: str
    tf_http_status: int
    tf_grpc_code: str


def _row(code: str, http_status: int, grpc_code: str, *, tf: tuple[int, str] | None = None) -> ErrorRow:
    tf_http_status, tf_grpc_code = tf or (http_status, grpc_code)
    return ErrorRow(code, http_status, grpc_code, tf_http_status, tf_grpc_code)


INTERNAL: Final = _row("internal", 500, "INTERNAL")

ERROR_TABLE: Final[dict[type[RetrievalError], ErrorRow]] = {
    InvalidQuery: _row("invalid_query", 422, "INVALID_ARGUMENT", tf=(400, "INVALID_ARGUMENT")),
    PayloadTooLarge: _row("payload_too_large", 413, "RESOURCE_EXHAUSTED"),
    NotFound: _row("not_found", 404, "NOT_FOUND"),
    UnknownModel: _row("unknown_model", 404, "NOT_FOUND"),
    UnknownVersion: _row("unknown_version", 404, "NOT_FOUND"),
    UnknownUser: _row("unknown_user", 404, "NOT_FOUND"),
    UnknownLabel: _row("unknown_label", 404, "NOT_FOUND", tf=(400, "INVALID_ARGUMENT")),
    UnknownSignature: _row("unknown_signature", 400, "FAILED_PRECONDITION"),
    Unsupported: _row("unsupported", 501, "UNIMPLEMENTED"),
    Unauthenticated: _row("unauthenticated", 401, "UNAUTHENTICATED"),
    PermissionDenied: _row("permission_denied", 403, "PERMISSION_DENIED"),
    FailedPrecondition: _row("failed_precondition", 400, "FAILED_PRECONDITION"),
    NotEnoughMemory: _row("not_enough_memory", 503, "RESOURCE_EXHAUSTED"),
    Overloaded: _row("overloaded", 429, "RESOURCE_EXHAUSTED", tf=(503, "UNAVAILABLE")),
    DeadlineExceeded: _row("deadline_exceeded", 504, "DEADLINE_EXCEEDED"),
    Unavailable: _row("unavailable", 503, "UNAVAILABLE"),
    NotReady: _row("not_ready", 503, "UNAVAILABLE"),
    BackendError: _row("backend_error", 503, "UNAVAILABLE"),
    DeviceLost: _row("device_lost", 503, "UNAVAILABLE"),
    # Ends the process at start and refuses the swap later; a request never meets it.
    ArtifactError: _row("artifact_error", 500, "INTERNAL"),
    InternalError: INTERNAL,
    RetrievalError: INTERNAL,
}


def error_row(error: BaseException) -> ErrorRow:
    """The row of `error`: that of the nearest class above it, `INTERNAL` for anything not ours."""
    for cls in type(error).__mro__:
        row = ERROR_TABLE.get(cls)
        if row is not None:
            return row
    return INTERNAL


def public_message(error: BaseException) -> str:
    """The text a caller may read: the error's own, except that a bug of ours tells nothing."""
    return "internal error" if error_row(error).http_status == 500 else str(error)


def retry_after_seconds(error: BaseException) -> int | None:
    """Whole seconds (at least 1) for HTTP's Retry-After, or None where there is nothing to wait for."""
    return max(1, math.ceil(error.retry_after_s)) if isinstance(error, Overloaded) else None


def fresh_error(error: BaseException) -> RetrievalError:
    """A new exception for one waiter of a failed batch, with `error` as its cause.

    An exception object collects the traceback of everyone who raises it, so waiters never share
    one. Whatever is not a `BackendError` is a bug of ours and becomes `InternalError`.
    """
    fresh: RetrievalError
    if isinstance(error, BackendError):
        fresh = type(error)(str(error))
    else:
        fresh = InternalError(f"{type(error).__name__}: {error}")
    fresh.__cause__ = error
    return fresh
