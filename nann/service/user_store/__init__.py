"""Live histories of users: what they did since the artifact was built."""

from __future__ import annotations

from nann.service.user_store.base import LiveHistory, UserStore
from nann.service.user_store.memory import MemoryUserStore
from nann.service.user_store.sqlite import SqliteUserStore

__all__ = ["LiveHistory", "MemoryUserStore", "SqliteUserStore", "UserStore", "open_user_store"]


async def open_user_store(location: str, *, history_limit: int) -> UserStore:
    """The store at `location`: ``memory``, or the path of a SQLite file (made if it is not there).

    Raises:
        OSError: the file cannot be opened or is not ours.
    """
    if location == "memory":
        return MemoryUserStore(history_limit=history_limit)
    return await SqliteUserStore.open(location, history_limit=history_limit)
