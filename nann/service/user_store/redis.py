"""Live histories in Redis, for several servers that share one store.

A user is one string, so that a batch is one ``MGET``: a sign, then every event as a line of JSON.

    nann:1:history:<user id>    "+\\n205137\\n\\"x\\""     the sign is "-" once the base history is hidden

The usual list a user costs forty times as much to read where a batch holds many users, because each
event is a reply of its own; and trimming it is a second command. docs/adr/0014-user-stores.md has
the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nann.service.logs import get_logger
from nann.service.user_store.base import LiveHistory

if TYPE_CHECKING:
    from nann.engine.types import ItemId

__all__ = ["RedisUserStore"]

# The number is the format's: another form gets another one, and never meets these values.
_PREFIX: Final = "nann:1:history:"
_SHOWN: Final = b"+"
_HIDDEN: Final = b"-"
_NOTHING: Final = LiveHistory()

# Adds ARGV[1] (each event after a line feed) and cuts off what is older than the newest ARGV[2].
# A script, because Redis runs it as one: no reader sees a history between the two steps.
_APPEND: Final = """
local events = (redis.call('GET', KEYS[1]) or '+') .. ARGV[1]
local _, count = string.gsub(events, '\\n', '')
local first = 1
for _ = 0, count - tonumber(ARGV[2]) do
    first = string.find(events, '\\n', first + 1, true)
end
if first > 1 then
    events = string.sub(events, 1, 1) .. string.sub(events, first)
end
redis.call('SET', KEYS[1], events)
"""

# Each call in flight has a connection; a round trip takes a fraction of a millisecond, so that few
# carry thousands of calls a second, and calls beyond them wait for one, no longer than the timeout.
_MAX_CONNECTIONS: Final = 32
# A store that hangs costs each query the whole timeout. So after some failures in a row one call in a
# while tries, for all the others, which fail at once.
_FAILURES_IN_A_ROW: Final = 3
_REST_S: Final = 1.0

log = get_logger(__name__)


class RedisUserStore:
    """A `UserStore` in Redis. As durable as that Redis: see docs/settings.md on its append-only file.

    Nothing is sent twice. A write whose answer never came may have been carried out, and only the
    caller can know whether doing it again does harm.
    """

    def __init__(
        self,
        client: Redis,
        *,
        history_limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._history_limit = history_limit
        self._clock = clock
        self._failures = 0
        self._next_try_s = 0.0

    @classmethod
    async def open(cls, url: str, *, history_limit: int, timeout_s: float) -> RedisUserStore:
        """The store at ``redis://``, ``rediss://`` (TLS) or ``unix://``; it need not answer yet.

        Raises:
            OSError: the URL is none that Redis' clients know.
        """
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # With RESP3 the client takes what is pending on an idle connection, its end included,
                # for a notification: after a restart of Redis every connection would fail one call.
                protocol=2,
                retry=Retry(NoBackoff(), 0),
            )
            # What is wrong with the other options of a URL shows when a connection is made of them.
            pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError) as error:
            raise OSError(f"user store: not a URL of Redis: {error}") from error
        store = cls(Redis.from_pool(pool), history_limit=history_limit)
        try:
            await store._ask("PING")
        except OSError as error:
            # A start during an outage must not turn it into a longer one.
            log.warning("user store does not answer yet", where=_where(url), error=str(error))
        return store

    async def get_many(self, user_ids: Sequence[str]) -> list[LiveHistory]:
        if not user_ids:
            return []
        values = await self._ask("MGET", *(_PREFIX + user_id for user_id in user_ids))
        return [self._history(value) for value in values]

    async def append(self, user_id: str, item_ids: Sequence[ItemId]) -> None:
        newest = list(item_ids)[-self._history_limit :]
        if newest:
            lines = b"".join(b"\n" + orjson.dumps(item_id) for item_id in newest)
            await self._ask("EVAL", _APPEND, 1, _PREFIX + user_id, lines, self._history_limit)

    async def delete(self, user_id: str) -> None:
        await self._ask("SET", _PREFIX + user_id, _HIDDEN)

    async def close(self) -> None:
        await self._client.aclose()

    def _history(self, value: bytes | None) -> LiveHistory:
        if value is None:
            return _NOTHING
        sign, events = value[:1], value[2:]
        if sign not in (_SHOWN, _HIDDEN):
            raise OSError(f"user store: a key under {_PREFIX} was written by another program")
        # JSON has no bare line feed inside a value, so each one here is a border.
        item_ids = orjson.loads(b"[" + events.replace(b"\n", b",") + b"]")
        return LiveHistory(tuple(item_ids[-self._history_limit :]), sign == _HIDDEN)

    async def _ask(self, *command: Any) -> Any:
        """What Redis answers; every way to fail is an OSError."""
        if self._failures >= _FAILURES_IN_A_ROW:
            now_s = self._clock()
            if now_s < self._next_try_s:
                raise OSError("user store: not asked, because it did not answer just now")
            self._next_try_s = now_s + _REST_S
        try:
            answer = await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            self._failures += 1
            raise OSError(f"user store: {error}") from error
        except RedisError as error:  # a refusal is an answer
            self._failures = 0
            raise OSError(f"user store: {error}") from error
        self._failures = 0
        return answer


def _where(url: str) -> str:
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]
