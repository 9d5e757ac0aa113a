"""Users' histories: the artifact's base, the live events over it, and the rules of deletion."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from nann.engine.errors import InvalidQuery, Unavailable, UnknownUser
from nann.engine.types import ItemId, UserId
from nann.service.errors import InternalError
from nann.service.logs import get_logger
from nann.service.metrics import Metrics, StoreOperation
from nann.service.registry import ServedVersion
from nann.service.tracing import current_request
from nann.service.types import UserProfile
from nann.service.user_store import LiveHistory, UserStore

__all__ = ["LiveLookup", "UserHistories"]

LiveLookup = Callable[[UserId], LiveHistory]
# Longer names are no names; the bound keeps a hostile id from growing the store's index.
_MAX_ID_BYTES = 512
_INT64 = range(-(2**63), 2**63)

T = TypeVar("T")
log = get_logger(__name__)


class UserHistories:
    """What is known of users. 42 and ``"42"`` name the same user: a URL cannot tell them apart."""

    def __init__(self, store: UserStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._failing: set[StoreOperation] = set()

    async def live(self, user_ids: Iterable[UserId]) -> LiveLookup:
        """Read the live histories of all these users in one round trip.

        The lookup, not this call, raises: `InvalidQuery` for an id that cannot be one, `Unavailable`
        when the store could not be read, so that each query of a call fails alone.
        """
        keys = set()
        for user_id in user_ids:
            with suppress(InvalidQuery):
                keys.add(_key(user_id))
        wanted = sorted(keys)
        failure: Unavailable | None = None
        found: dict[str, LiveHistory] = {}
        try:
            if wanted:
                read = await self._stored("read", self._store.get_many(wanted))
                found = dict(zip(wanted, read, strict=True))
        except Unavailable as error:
            failure = error

        def lookup(user_id: UserId) -> LiveHistory:
            key = _key(user_id)
            if failure is not None:
                raise Unavailable(str(failure)) from failure
            return found[key]

        return lookup

    def history(self, user_id: UserId, live: LiveHistory, served: ServedVersion) -> UserProfile:
        """Base history, then live events, newest last.

        Raises:
            UnknownUser: neither knows them, or all that was known is deleted.
        """
        base = None if live.base_hidden else self.base(user_id, served)
        if base is None and not live.item_ids:
            raise UnknownUser(f"no user {user_id!r} here")
        base = base or ()
        return UserProfile(user_id, (*base, *live.item_ids), len(base), len(live.item_ids))

    def base(self, user_id: UserId, served: ServedVersion) -> tuple[ItemId, ...] | None:
        """The artifact's own history of a user, None when it has none. It knows of no deletion."""
        own = _as_user_id(user_id, served.metadata.user_id_type)
        return None if own is None else served.engine.user_history(own)

    async def record(
        self, user_id: UserId, events: Sequence[ItemId], served: Sequence[ServedVersion]
    ) -> None:
        """Store events durably.

        Raises:
            InvalidQuery: an id is malformed or of a type that no served model has.
            Unavailable: the store did not say that it wrote.
        """
        key = _key(user_id)
        if all(_as_user_id(user_id, version.metadata.user_id_type) is None for version in served):
            raise InvalidQuery(f"user_id {user_id!r}: the user ids of this model are integers")
        types = {version.metadata.item_id_type for version in served}
        for item_id in events:
            _check_item_id(item_id, types)
        await self._stored("append", self._store.append(key, events))

    async def delete(self, user_id: UserId, served: Sequence[ServedVersion]) -> None:
        """Forget a user for good; raises `UnknownUser` when there is nothing to forget."""
        live = (await self.live([user_id]))(user_id)
        in_base = not live.base_hidden and any(self.base(user_id, version) for version in served)
        if not live.item_ids and not in_base:
            raise UnknownUser(f"no user {user_id!r} here")
        await self._stored("delete", self._store.delete(_key(user_id)))

    async def _stored(self, operation: StoreOperation, call: Awaitable[T]) -> T:
        start_s = time.perf_counter()
        try:
            answer = await call
        except OSError as error:
            self._metrics.store_failed(operation)
            # Once an outage, and not once a query; the metric counts them.
            if operation not in self._failing:
                self._failing.add(operation)
                log.error("user store fails", operation=operation, error=str(error))
            raise Unavailable("the user store does not answer now") from error
        duration_s = time.perf_counter() - start_s
        self._metrics.store_answered(operation, duration_s)
        if (span := current_request()) is not None:
            span.record("user_store", duration_s, operation=operation)
        if operation in self._failing:
            self._failing.remove(operation)
            log.info("user store works again", operation=operation)
        return answer


def _key(user_id: UserId) -> str:
    if isinstance(user_id, int):
        return str(user_id)
    _check_text(user_id, "user_id")
    return user_id


def _check_text(text: str, name: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidQuery(f"{name} is not valid Unicode") from None
    if not 1 <= size <= _MAX_ID_BYTES or "\0" in text:
        raise InvalidQuery(f"{name} must hold 1 to {_MAX_ID_BYTES} bytes of UTF-8 without NUL")


def _check_item_id(item_id: ItemId, types: Iterable[str]) -> None:
    if isinstance(item_id, str):
        kind = "str"
        _check_text(item_id, "item_id")
    else:
        kind = "int"
        if item_id not in _INT64:
            raise InvalidQuery(f"item_id {item_id} does not fit 64 bits")
    if kind not in types:
        raise InvalidQuery(f"item_id {item_id!r}: item ids here are of type {' or '.join(sorted(types))}")


def _as_user_id(user_id: UserId, kind: str) -> UserId | None:
    """`user_id` as the model's type, None when it cannot be one: ``"42"`` is 42, ``"042"`` is nobody."""
    if kind == "str":
        return str(user_id)
    if kind != "int":
        raise InternalError(f"a model has user ids of type {kind!r}")
    if isinstance(user_id, str):
        with suppress(ValueError):
            number = int(user_id)
            return number if str(number) == user_id and number in _INT64 else None
        return None
    return user_id if user_id in _INT64 else None
