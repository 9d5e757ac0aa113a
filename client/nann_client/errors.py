"""Every way a call can fail, as one tree; the classes have the names of the server's error table.

NannError                     code, message, request_id
├── InvalidQuery              sending it again will not help
│   └── PayloadTooLarge
├── NotFound
│   ├── UnknownModel
│   ├── UnknownVersion
│   ├── UnknownLabel
│   └── UnknownUser
├── Unsupported               this model or build cannot do it
├── Unauthenticated
├── PermissionDenied
├── Unavailable               the same call may succeed later
│   ├── NotReady
│   ├── BackendError
│   │   └── DeviceLost
│   ├── Overloaded            ``retry_after_s``: when to come back
│   └── ConnectionFailed      no answer: refused, or broken off
├── DeadlineExceeded          by the server's clock or by ours
├── ServerError               a bug of the server's; its log has the cause under the request id
└── BadReply                  an answer that is not the service's: a proxy's page, a wrong address
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "BackendError",
    "BadReply",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DeviceLost",
    "InvalidQuery",
    "NannError",
    "NotFound",
    "NotReady",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "ServerError",
    "Unauthenticated",
    "Unavailable",
    "UnknownLabel",
    "UnknownModel",
    "UnknownUser",
    "UnknownVersion",
    "Unsupported",
    "error_of_code",
]


class NannError(Exception):
    """Base of all of them. `code` is the server's stable word; `request_id` finds the call in its log."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidQuery(NannError):
    """The message breaks a rule; `message` says which."""


class PayloadTooLarge(InvalidQuery):
    """The message is larger than the server reads."""


class NotFound(NannError):
    """Something that the call names does not exist."""


class UnknownModel(NotFound):
    """No model of that name is served."""


class UnknownVersion(NotFound):
    """The model is served, that version of it is not."""


class UnknownLabel(NotFound):
    """The model is served, it has no such label."""


class UnknownUser(NotFound):
    """Neither the live histories nor the model know the user."""


class Unsupported(NannError):
    """Well formed, but this model or build cannot carry it out."""


class Unauthenticated(NannError):
    """No credential, or one that is not valid."""


class PermissionDenied(NannError):
    """A good credential that does not allow this."""


class Unavailable(NannError):
    """The server cannot answer now."""


class NotReady(Unavailable):
    """No model has finished loading. Nothing was done."""


class BackendError(Unavailable):
    """The engine failed during this batch."""


class DeviceLost(BackendError):
    """The device that searched is gone; another may answer."""


class Overloaded(Unavailable):
    """Refused at once, because too much waits already. Nothing was done."""


class ConnectionFailed(Unavailable):
    """No answer came. With `never_sent` the server has not even seen the call."""

    def __init__(self, message: str, *, never_sent: bool) -> None:
        super().__init__(message, code="connection_failed")
        self.never_sent = never_sent


class DeadlineExceeded(NannError):
    """No answer in time."""


class ServerError(NannError):
    """A bug of the server's, which tells callers no more than this."""


class BadReply(NannError):
    """What answered is not the service, or not of a version that this client understands."""


_BY_CODE: Final[dict[str, type[NannError]]] = {
    "invalid_query": InvalidQuery,
    "malformed_json": InvalidQuery,
    "unsupported_media_type": InvalidQuery,
    "payload_too_large": PayloadTooLarge,
    "not_found": NotFound,
    "method_not_allowed": NotFound,
    "unknown_model": UnknownModel,
    "unknown_version": UnknownVersion,
    "unknown_label": UnknownLabel,
    "unknown_user": UnknownUser,
    "unsupported": Unsupported,
    "unauthenticated": Unauthenticated,
    "permission_denied": PermissionDenied,
    "overloaded": Overloaded,
    "too_many_connections": Overloaded,
    "deadline_exceeded": DeadlineExceeded,
    "unavailable": Unavailable,
    "not_ready": NotReady,
    "backend_error": BackendError,
    "device_lost": DeviceLost,
    "internal": ServerError,
}


def error_of_code(
    code: str,
    message: str,
    *,
    otherwise: type[NannError] = ServerError,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> NannError:
    """The error of a code of the table; of a code that this client does not know, `otherwise`."""
    error_class = _BY_CODE.get(code, otherwise)
    return error_class(message, code=code, request_id=request_id, retry_after_s=retry_after_s)
