"""The rules of a message's shape that every wire form shares, so that they cannot drift apart.

What a request means (exactly one subject, limits of k and ef, the width of `comm_seq`, known ids) is
checked by the service and the engine, once for all transports, not here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nann.engine.errors import InvalidQuery
from nann.service.errors import public_message
from nann.service.logs import new_request_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float32

    from nann.engine.types import ItemId, UserId

__all__ = ["bounded_message", "finite_vector", "parse_id", "request_id_of", "user_id_of_text"]

_INT64_MIN: Final = -(1 << 63)
_INT64_MAX: Final = (1 << 63) - 1
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
# TensorFlow Serving cuts its messages here too (grpc_status_util.cc): they travel in a header, and a
# message may quote whatever the caller sent.
_MAX_MESSAGE: Final = 1024
_CANONICAL_INTEGER: Final = re.compile(r"-?[1-9][0-9]{0,18}|0")


def bounded_message(error: BaseException) -> str:
    """The text a caller may read of `error`, of a bounded length."""
    message = public_message(error)
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "...TRUNCATED"


def request_id_of(text: str | None) -> str:
    """The caller's own request id, or a fresh one when there is none that is fit for a header and a log."""
    return text if text is not None and _REQUEST_ID.fullmatch(text) else new_request_id()


def finite_vector(values: np.ndarray[Any, Any] | Sequence[float], name: str) -> Float32[np.ndarray, " width"]:
    """`values` as flat float32; raises InvalidQuery for NaN, infinities and float32 overflow."""
    with np.errstate(over="ignore"):
        vector = np.asarray(values).astype(np.float32, copy=False).reshape(-1)
    finite = np.isfinite(vector)
    if not finite.all():
        where = int(np.argmin(finite))
        raise InvalidQuery(f"{name}: element {where} is not a finite number")
    return vector


def parse_id(value: object, name: str) -> ItemId:
    """`value` if it can be an id (a 64-bit integer or a string); raises InvalidQuery otherwise."""
    if type(value) is str:
        return value
    if type(value) is int:
        if _INT64_MIN <= value <= _INT64_MAX:
            return value
        raise InvalidQuery(f"{name}: {value} does not fit 64 bits")
    raise InvalidQuery(f"{name}: expected an integer or a string, found {_kind(value)}")


def user_id_of_text(text: str) -> UserId:
    """The id a URL path segment stands for: the integer where it is written like one, else the text."""
    if _CANONICAL_INTEGER.fullmatch(text) and _INT64_MIN <= (number := int(text)) <= _INT64_MAX:
        return number
    return text


def _kind(value: object) -> str:
    """JSON's word for a Python value, with the value where it is short enough to help."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value}"
        case list() | tuple():
            return "an array"
        case dict():
            return "an object"
        case _:
            return type(value).__name__
