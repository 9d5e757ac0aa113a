"""The seam between the service and whatever keeps live histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nann.engine.types import ItemId

__all__ = ["LiveHistory", "UserStore"]


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """A user's live events, oldest first, and whether the artifact's history of them is hidden.

    `base_hidden` is set by a deletion and stays: who asked to be forgotten does not come back with
    the next click.
    """

    item_ids: tuple[ItemId, ...] = ()
    base_hidden: bool = False


class UserStore(Protocol):
    """Live histories by user. A user is named by text; item ids keep their type.

    One round trip a call, whatever the number of users. An acknowledged write survives the death of
    the process (except in a store that says it lives in memory). Of each user the newest
    `history_limit` events are returned. Every failure is an OSError, and the next call tries again.
    """

    async def get_many(self, user_ids: Sequence[str]) -> list[LiveHistory]:
        """One `LiveHistory` a user, in order; an empty one for a user never heard of."""
        ...

    async def append(self, user_id: str, item_ids: Sequence[ItemId]) -> None:
        """Add events, oldest first: all of them or none.

        When this raises, none is stored; but where an answer got lost on its way (a store behind a
        network), all may be.
        """
        ...

    async def delete(self, user_id: str) -> None:
        """Forget the live events and hide the base history."""
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of files and threads."""
        ...
