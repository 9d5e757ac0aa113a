"""The queries that wait for a lane: who is let in, and who goes next.

Queries are of two kinds. *Interactive* ones came alone, and somebody waits for each; *bulk* ones came in a
call of many. Interactive ones go first, but while both wait bulk gets `BULK_SHARE` of the work, so that
neither starves the other; and bulk fills at most half of the queue, so that it never keeps the others out.
All state belongs to the event loop that owns the queue.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, Protocol, TypeAlias, TypeVar

__all__ = ["BULK_SHARE", "Group", "RejectReason", "Waiter", "WaitingQueue"]

RejectReason: TypeAlias = Literal["queue_full", "work_full", "too_late", "expired", "closing"]

# While both kinds wait, so much of the work dispatched is bulk: the others see three quarters of a server.
BULK_SHARE: Final = 0.25
_BULK_PART_OF_QUEUE: Final = 0.5


class Waiter(Protocol):
    """One query in the queue; only those of equal `compat` and kind may share a batch."""

    @property
    def compat(self) -> Hashable: ...
    @property
    def cost(self) -> int: ...
    @property
    def bulk(self) -> bool: ...
    @property
    def arrival_s(self) -> float: ...


W = TypeVar("W", bound=Waiter)


@dataclass(eq=False, slots=True)
class Group(Generic[W]):
    """Waiters that may share a batch, oldest first; a dict, so that any of them leaves in O(1)."""

    bulk: bool
    waiters: OrderedDict[W, None] = field(default_factory=OrderedDict)
    work: int = 0

    @property
    def oldest(self) -> W:
        return next(iter(self.waiters))


class WaitingQueue(Generic[W]):
    """At most `limit` waiters, whose costs add up to at most `work_limit`.

    A call dearer than a whole bound is let in when nobody else waits: refusing it would be refusing it
    for ever.
    """

    def __init__(self, *, limit: int, work_limit: int) -> None:
        self._limit = limit
        self._work_limit = work_limit
        self._groups: dict[tuple[Hashable, bool], Group[W]] = {}
        self._depth = {True: 0, False: 0}  # by bulk
        self._work = {True: 0, False: 0}
        self._owed_to_bulk = 0.0

    @property
    def depth(self) -> int:
        """Waiters."""
        return self._depth[True] + self._depth[False]

    @property
    def work(self) -> int:
        """Their costs added up."""
        return self._work[True] + self._work[False]

    def work_before(self, *, bulk: bool) -> float:
        """The work that is done before that of a new waiter: all of it, or what interactive ones see."""
        if bulk:
            return self.work
        own = self._work[False]
        return own + min(self._work[True], own * BULK_SHARE / (1 - BULK_SHARE))

    def refusal(
        self, *, n: int, cost: float, bulk: bool, ahead: int = 0, ahead_cost: float = 0.0
    ) -> tuple[RejectReason, str] | None:
        """Why `n` more waiters of `cost` together cannot be let in; None when they can.

        `ahead` others, of `ahead_cost` together, have been let in and will be waiting before them.
        """
        bounds = [(1.0, self.depth + ahead, self.work + ahead_cost, "")]
        if bulk:
            bounds.append((_BULK_PART_OF_QUEUE, self._depth[True], self._work[True], " from batch calls"))
        for part, depth, work, whose in bounds:
            if depth and depth + n > part * self._limit:
                return "queue_full", f"{depth} queries{whose} are waiting"
            if depth and work + cost > part * self._work_limit:
                return "work_full", f"{work:.0f} items{whose} wait to be scored"
        return None

    def add(self, waiter: W) -> None:
        """Let a waiter in."""
        group = self._groups.setdefault((waiter.compat, waiter.bulk), Group(waiter.bulk))
        group.waiters[waiter] = None
        self._count(group, waiter, +1)

    def remove(self, waiter: W) -> bool:
        """Take a waiter out; False when it is not in (any more)."""
        key = (waiter.compat, waiter.bulk)
        group = self._groups.get(key)
        if group is None or waiter not in group.waiters:
            return False
        del group.waiters[waiter]
        if not group.waiters:
            del self._groups[key]
        self._count(group, waiter, -1)
        return True

    def groups(self) -> Iterable[Group[W]]:
        """Every group that has a waiter."""
        return self._groups.values()

    def next_group(self, is_due: Callable[[Group[W]], bool]) -> Group[W] | None:
        """The due group whose turn it is: of the kind that goes next, the one with the oldest waiter."""
        due = [group for group in self._groups.values() if is_due(group)]
        bulk_first = self._owed_to_bulk > 0
        return min(due, key=lambda group: (group.bulk != bulk_first, group.oldest.arrival_s), default=None)

    def dispatched(self, work: int, *, bulk: bool) -> None:
        """So much work left the queue for a lane."""
        if not self._depth[True]:
            self._owed_to_bulk = 0.0
        elif not bulk:
            self._owed_to_bulk += work * BULK_SHARE / (1 - BULK_SHARE)
        elif self._depth[False]:
            self._owed_to_bulk -= work
        else:  # nobody was kept waiting by it, so it only pays a debt
            self._owed_to_bulk = max(0.0, self._owed_to_bulk - work)

    def _count(self, group: Group[W], waiter: W, delta: Literal[-1, 1]) -> None:
        group.work += delta * waiter.cost
        self._depth[group.bulk] += delta
        self._work[group.bulk] += delta * waiter.cost
