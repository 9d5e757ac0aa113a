"""What waits in a batcher: calls, and the queries that they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

__all__ = ["Answer", "Batchable", "Call", "DispatchReason", "Entry", "P", "R"]

DispatchReason: TypeAlias = Literal["full", "lane_free", "fill_timer", "closing", "probe", "shadow"]


class Batchable(Protocol):
    """A checked query: only equal `compat` may share a batch; `cost` estimates the items to score."""

    @property
    def compat(self) -> Hashable: ...
    @property
    def cost(self) -> int: ...


P = TypeVar("P", bound=Batchable)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """One query's result, how long it waited for a lane, how long its batch was on it, and what sent
    the batch off."""

    result: R
    queue_s: float
    search_s: float
    batch_size: int
    reason: DispatchReason


class Call(Generic[R]):
    """What one `submit` or `submit_many` waits for: an outcome for each of its queries."""

    def __init__(
        self, n: int, *, arrival_s: float, deadline_s: float, bulk: bool, done: asyncio.Future[None]
    ) -> None:
        self.outcomes: list[Answer[R] | Exception | None] = [None] * n
        self.unfinished = n
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.bulk = bulk
        self.done = done

    def settle(self, position: int, outcome: Answer[R] | Exception) -> None:
        """The first outcome of a query counts; the last query of the call wakes its waiter."""
        if self.outcomes[position] is not None:
            return
        self.outcomes[position] = outcome
        self.unfinished -= 1
        if not self.unfinished and not self.done.done():
            self.done.set_result(None)


class Entry(Generic[P, R]):
    """One query of a call, and its place in it."""

    __slots__ = ("call", "compat", "cost", "position", "query")

    def __init__(self, query: P, call: Call[R], position: int) -> None:
        self.query = query
        self.call = call
        self.position = position
        self.compat = query.compat
        # A filter that admits nothing leaves nothing to score, and takes a lane all the same.
        self.cost = max(query.cost, 1)

    @property
    def bulk(self) -> bool:
        return self.call.bulk

    @property
    def arrival_s(self) -> float:
        return self.call.arrival_s

    @property
    def is_settled(self) -> bool:
        """Expired, abandoned or answered."""
        return self.call.outcomes[self.position] is not None or self.call.done.done()

    def settle(self, outcome: Answer[R] | Exception) -> None:
        self.call.settle(self.position, outcome)
