"""Client of the nann retrieval service: sync and async, REST and gRPC, with deadlines and retries.

    with Client("http://127.0.0.1:8501", timeout_s=0.5) as client:
        reply = client.retrieve(Query(user_id=97, k=10))

`Client` waits, `AsyncClient` has the same methods to be awaited; the URL's scheme chooses the transport.
"""

from __future__ import annotations

from nann_client.client import AsyncClient, Client
from nann_client.errors import (
    BackendError,
    BadReply,
    ConnectionFailed,
    DeadlineExceeded,
    DeviceLost,
    InvalidQuery,
    NannError,
    NotFound,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ServerError,
    Unauthenticated,
    Unavailable,
    UnknownLabel,
    UnknownModel,
    UnknownUser,
    UnknownVersion,
    Unsupported,
)
from nann_client.retry import RetryPolicy
from nann_client.types import Id, Item, Note, Query, Reply, SearchParams, User, VersionStatus

__all__ = [
    "AsyncClient",
    "BackendError",
    "BadReply",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DeviceLost",
    "Id",
    "InvalidQuery",
    "Item",
    "NannError",
    "NotFound",
    "NotReady",
    "Note",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "Query",
    "Reply",
    "RetryPolicy",
    "SearchParams",
    "ServerError",
    "Unauthenticated",
    "Unavailable",
    "UnknownLabel",
    "UnknownModel",
    "UnknownUser",
    "UnknownVersion",
    "Unsupported",
    "User",
    "VersionStatus",
]
