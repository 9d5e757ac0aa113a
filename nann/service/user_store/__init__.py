"""Live histories of users: what they did since the artifact was built."""

from __future__ import annotations

from typing import Final

from nann.service.user_store.base import LiveHistory, UserStore
from nann.service.user_store.memory import MemoryUserStore
from nann.service.user_store.sqlite import SqliteUserStore

__all__ = ["LiveHistory", "MemoryUserStore", "SqliteUserStore", "UserStore", "open_user_store"]

_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")


async def open_user_store(location: str, *, history_limit: int, timeout_s: float) -> UserStore:
    """The store at `location`: ``memory``, a URL of Redis, or the path of a SQLite file (made if absent).

    `timeout_s` bounds each wait for Redis; a file needs none.

    Raises:
        OSError: the file cannot be opened or is not ours, or the URL is none of Redis.
    """
    if location == "memory":
        return MemoryUserStore(history_limit=history_limit)
    if location.startswith(_REDIS_SCHEMES):
        # Here, because the client is slow to import and most servers have no Redis.
        from nann.service.user_store.redis import RedisUserStore

        return await RedisUserStore.open(location, history_limit=history_limit, timeout_s=timeout_s)
    if "://" in location:
        scheme = location.partition("://")[0]
        raise OSError(f"user store: no store at {scheme}://; use a path, 'memory', redis:// or rediss://")
    return await SqliteUserStore.open(location, history_limit=history_limit)
