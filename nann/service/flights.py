"""The batches that lanes have: of each lane one that it searches, and some for afterwards."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic

from nann.service.entry import DispatchReason, Entry, P, R
from nann.service.search_rate import SearchRate

__all__ = ["Flight", "Flights"]


class Flight(Generic[P, R]):
    """A batch that is on a lane; one that is there for afterwards has not begun."""

    def __init__(self, batch: Sequence[Entry[P, R]], reason: DispatchReason) -> None:
        self.batch = batch
        self.reason: DispatchReason = reason
        self.work = sum(entry.cost for entry in batch)
        self.begun_s: float | None = None


class Flights(Generic[P, R]):
    """What is on each lane, in the order in which it is searched."""

    def __init__(self, n_lanes: int) -> None:
        self._of: list[list[Flight[P, R]]] = [[] for _ in range(n_lanes)]

    @property
    def work_ahead(self) -> int:
        """The cost of all that has not begun."""
        return sum(flight.work for flights in self._of for flight in flights[1:])

    def first(self, lane: int) -> Flight[P, R] | None:
        """What the lane searches."""
        return self._of[lane][0] if self._of[lane] else None

    def add(self, lane: int, flight: Flight[P, R]) -> None:
        """It comes after what is there."""
        self._of[lane].append(flight)

    def remove(self, lane: int, flight: Flight[P, R]) -> None:
        """It has ended."""
        self._of[lane].remove(flight)

    def first_begun(self, lanes: Iterable[int], compat: Hashable) -> int | None:
        """Of `lanes` that search somebody's queries of this kind, the one that began first."""
        began: dict[int, float] = {}
        for lane in lanes:
            flight = self.first(lane)
            if flight is None or flight.begun_s is None or flight.reason in ("probe", "shadow"):
                continue
            if flight.batch[0].compat == compat:
                began[lane] = flight.begun_s
        return min(began, key=began.__getitem__, default=None)

    def remaining_s(self, lane: int, now_s: float, rate: SearchRate) -> float:
        """How long a lane will go on with what it has."""
        flight = self.first(lane)
        if flight is None or flight.begun_s is None:
            return 0.0
        cost = flight.batch[0].cost
        all_s = sum(rate.time_of_batch(each.work, cost) for each in self._of[lane])
        return max(0.0, flight.begun_s + all_s - now_s)
