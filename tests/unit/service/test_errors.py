from __future__ import annotations

import pytest

from nann.engine import errors as engine_errors
from nann.engine.errors import (
    ArtifactError,
    BackendError,
    DeadlineExceeded,
    InvalidQuery,
    NotReady,
    Overloaded,
    RetrievalError,
    UnknownLabel,
    UnknownModel,
    UnknownUser,
    UnknownVersion,
    Unsupported,
)
from nann.service.errors import (
    ERROR_TABLE,
    InternalError,
    PayloadTooLarge,
    PermissionDenied,
    Unauthenticated,
    UnknownSignature,
    error_row,
    fresh_error,
    public_message,
    retry_after_seconds,
)

GRPC_CODES = {
    *("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "UNAUTHENTICATED"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INTERNAL"),
}


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def test_every_class_of_the_tree_has_a_row_of_its_own() -> None:
    ours = {cls for cls in subclasses(RetrievalError) if cls.__module__.startswith("nann.")}
    assert {getattr(engine_errors, name) for name in engine_errors.__all__} <= ours
    assert ours == set(ERROR_TABLE)


def test_every_code_is_a_real_one() -> None:
    for row in ERROR_TABLE.values():
        assert {row.grpc_code, row.tf_grpc_code} <= GRPC_CODES
        assert 400 <= row.http_status < 600 and 400 <= row.tf_http_status < 600


# House style, section 3.
@pytest.mark.parametrize(
    ("cls", "http", "grpc", "tf_http", "tf_grpc"),
    [
        (InvalidQuery, 422, "INVALID_ARGUMENT", 400, "INVALID_ARGUMENT"),
        (PayloadTooLarge, 413, "RESOURCE_EXHAUSTED", 413, "RESOURCE_EXHAUSTED"),
        (UnknownModel, 404, "NOT_FOUND", 404, "NOT_FOUND"),
        (UnknownVersion, 404, "NOT_FOUND", 404, "NOT_FOUND"),
        (UnknownUser, 404, "NOT_FOUND", 404, "NOT_FOUND"),
        (UnknownLabel, 404, "NOT_FOUND", 400, "INVALID_ARGUMENT"),
        (UnknownSignature, 400, "FAILED_PRECONDITION", 400, "FAILED_PRECONDITION"),
        (Unsupported, 501, "UNIMPLEMENTED", 501, "UNIMPLEMENTED"),
        (Unauthenticated, 401, "UNAUTHENTICATED", 401, "UNAUTHENTICATED"),
        (PermissionDenied, 403, "PERMISSION_DENIED", 403, "PERMISSION_DENIED"),
        (Overloaded, 429, "RESOURCE_EXHAUSTED", 503, "UNAVAILABLE"),
        (DeadlineExceeded, 504, "DEADLINE_EXCEEDED", 504, "DEADLINE_EXCEEDED"),
        (NotReady, 503, "UNAVAILABLE", 503, "UNAVAILABLE"),
        (BackendError, 503, "UNAVAILABLE", 503, "UNAVAILABLE"),
        (InternalError, 500, "INTERNAL", 500, "INTERNAL"),
        (KeyError, 500, "INTERNAL", 500, "INTERNAL"),
    ],
)
def test_the_table(cls: type[Exception], http: int, grpc: str, tf_http: int, tf_grpc: str) -> None:
    row = error_row(cls("why"))
    assert (row.http_status, row.grpc_code, row.tf_http_status, row.tf_grpc_code) == (
        http,
        grpc,
        tf_http,
        tf_grpc,
    )


def test_a_subclass_without_a_row_takes_the_nearest() -> None:
    assert error_row(type("Special", (UnknownUser,), {})("x")) is ERROR_TABLE[UnknownUser]


def test_our_own_bugs_say_nothing_to_callers() -> None:
    assert public_message(InvalidQuery("k must be …")) == "k must be …"
    for error in (KeyError("secret"), InternalError("secret"), ArtifactError("f", expected="a", found="b")):
        assert public_message(error) == "internal error"


def test_retry_after_is_whole_seconds_of_at_least_one() -> None:
    assert retry_after_seconds(Overloaded("full", retry_after_s=0.004)) == 1
    assert retry_after_seconds(Overloaded("full", retry_after_s=2.1)) == 3
    assert retry_after_seconds(NotReady("loading")) is None


def test_fresh_errors_are_fresh() -> None:
    cause = BackendError("out of memory")
    one, two = fresh_error(cause), fresh_error(cause)
    assert one is not two
    assert (type(one), str(one), one.__cause__) == (BackendError, "out of memory", cause)
    bug = fresh_error(IndexError("oops"))
    assert (type(bug), str(bug)) == (InternalError, "IndexError: oops")
