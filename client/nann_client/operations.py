"""What can be asked of the service, as values: nothing here knows of a transport, or waits.

Each function is a method of `Client` and of `AsyncClient`, with this signature and this text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from nann_client.errors import NannError
from nann_client.types import Id, Query, Reply, User, VersionStatus

__all__ = [
    "DeleteUser",
    "GetUser",
    "ModelStatus",
    "Operation",
    "RecordEvents",
    "Retrieve",
    "RetrieveMany",
    "delete_user",
    "model_status",
    "record_events",
    "retrieve",
    "retrieve_many",
    "user",
]

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Operation(Generic[T_co]):
    """A call whose result is a `T_co`. `repeatable`: doing it twice does no harm."""

    repeatable: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Retrieve(Operation[Reply]):
    query: Query


@dataclass(frozen=True, slots=True)
class RetrieveMany(Operation[list[Reply | NannError]]):
    queries: tuple[Query, ...]


@dataclass(frozen=True, slots=True)
class RecordEvents(Operation[int]):
    repeatable: ClassVar[bool] = False

    user_id: Id
    item_ids: tuple[Id, ...]


@dataclass(frozen=True, slots=True)
class GetUser(Operation[User]):
    user_id: Id
    model: str | None


@dataclass(frozen=True, slots=True)
class DeleteUser(Operation[None]):
    # The second of two would be told that there is no such user.
    repeatable: ClassVar[bool] = False

    user_id: Id


@dataclass(frozen=True, slots=True)
class ModelStatus(Operation[list[VersionStatus]]):
    model: str
    version: int | None


def retrieve(query: Query) -> Operation[Reply]:
    """The best items for one user."""
    return Retrieve(query)


def retrieve_many(queries: Sequence[Query]) -> Operation[list[Reply | NannError]]:
    """A reply, or the error that took its place, for each query, in order: one call, one failure each."""
    return RetrieveMany(tuple(queries))


def record_events(user_id: Id, item_ids: Sequence[Id]) -> Operation[int]:
    """Add what a user has just interacted with, oldest first; how many events are durable now.

    Sent again only when the server certainly has not recorded them.
    """
    return RecordEvents(user_id, tuple(item_ids))


def user(user_id: Id, *, model: str | None = None) -> Operation[User]:
    """What is known of a user; `model` says whose base history where several models are served."""
    return GetUser(user_id, model)


def delete_user(user_id: Id) -> Operation[None]:
    """Forget a user: the live history and, for good, the model's own."""
    return DeleteUser(user_id)


def model_status(model: str, *, version: int | None = None) -> Operation[list[VersionStatus]]:
    """The state of every version of a model, or of one."""
    return ModelStatus(model, version)
