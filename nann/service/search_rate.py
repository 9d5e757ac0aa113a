"""How long searches take, learnt from those that have been: what admission goes by."""

from __future__ import annotations

__all__ = ["SearchRate"]

# Each new measurement counts this much: the last ten or so batches decide.
_SMOOTHING = 0.2


class SearchRate:
    """A lane's time for work of given cost, in items to score (1 or more); 0 before anything was measured.

    A batch holds at most `max_batch` queries, and more than one only while they cost `batch_work_limit`
    together at most.
    """

    def __init__(self, *, max_batch: int, batch_work_limit: int) -> None:
        self._max_batch = max_batch
        self._batch_work_limit = batch_work_limit
        self._batch_s = 0.0
        self.seconds_per_cost: float | None = None
        """None before anything has been measured."""

    def learn(self, search_s: float, cost: int) -> None:
        """A batch of this cost took so long."""
        seconds_per_cost = search_s / cost
        if self.seconds_per_cost is None:
            self.seconds_per_cost, self._batch_s = seconds_per_cost, search_s
        self.seconds_per_cost += _SMOOTHING * (seconds_per_cost - self.seconds_per_cost)
        self._batch_s += _SMOOTHING * (search_s - self._batch_s)

    def time_of(self, work: float, cost: float) -> float:
        """Seconds for `work` in queries of `cost`: by items or by batches, whichever is less."""
        # The time of a small batch is dear by the item; that of a rare long one tells nothing of the next.
        return min(work * (self.seconds_per_cost or 0.0), work / self._full_batch(cost) * self._batch_s)

    def time_of_batch(self, work: float, cost: float) -> float:
        """Seconds for one batch of queries of `cost` when so much `work` waits."""
        return min(min(work, self._full_batch(cost)) * (self.seconds_per_cost or 0.0), self._batch_s)

    def _full_batch(self, cost: float) -> float:
        return max(cost, min(cost * self._max_batch, self._batch_work_limit))
