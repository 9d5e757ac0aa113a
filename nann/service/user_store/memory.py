"""Live histories in this process's memory: for tests and for services that may forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nann.service.user_store.base import LiveHistory

if TYPE_CHECKING:
    from nann.engine.types import ItemId

__all__ = ["MemoryUserStore"]

_NOTHING = LiveHistory()


class MemoryUserStore:
    """A dictionary. Lost at exit, not shared between processes, as large as its users make it."""

    def __init__(self, *, history_limit: int) -> None:
        self._history_limit = history_limit
        self._users: dict[str, LiveHistory] = {}

    async def get_many(self, user_ids: Sequence[str]) -> list[LiveHistory]:
        return [self._users.get(user_id, _NOTHING) for user_id in user_ids]

    async def append(self, user_id: str, item_ids: Sequence[ItemId]) -> None:
        known = self._users.get(user_id, _NOTHING)
        newest = (*known.item_ids, *item_ids)[-self._history_limit :]
        self._users[user_id] = LiveHistory(newest, known.base_hidden)

    async def delete(self, user_id: str) -> None:
        self._users[user_id] = LiveHistory(base_hidden=True)

    async def close(self) -> None:
        self._users.clear()
