"""Queries wait here for a lane, and travel in batches. The only place where anything waits.

    submit ──> admitted? ──> queue, one FIFO per compatible group ──> a free lane takes a batch
               no: refused at once     expired or abandoned: leaves      │ (thread; engine.search)
                                                                         └──> each waiter's future

All state belongs to the event loop, so there is no lock. Nothing polls: a dispatch is caused by an
arrival, by a lane that became free, or by the fill timer.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

from nann.engine.errors import DeadlineExceeded, NotReady, Overloaded
from nann.service.errors import InternalError, fresh_error
from nann.service.lane import Lane

__all__ = [
    "Answer",
    "BatchObserver",
    "Batchable",
    "Batcher",
    "BatcherLimits",
    "DispatchReason",
    "RejectReason",
]

DispatchReason: TypeAlias = Literal["full", "lane_free", "fill_timer", "closing"]
RejectReason: TypeAlias = Literal["queue_full", "work_full", "expired", "closing"]

# Each new measurement of the service rate counts this much: the last ten or so batches decide.
_RATE_SMOOTHING = 0.2
# uvloop rounds timers to the nearest millisecond, so one may fire this much early.
_TIMER_SLACK_S = 0.0005


class Batchable(Protocol):
    """A checked query: only equal `compat` may share a batch; `cost` estimates the items to score."""

    @property
    def compat(self) -> Hashable: ...
    @property
    def cost(self) -> int: ...


class TimerHandle(Protocol):
    def cancel(self) -> object: ...


class BatchObserver:
    """What a batcher tells about itself, on the event loop; this one listens to nothing of it."""

    def queue_changed(self, delta: int) -> None:
        """The queue grew (or shrank) by `delta` queries."""

    def lanes_changed(self, delta: int) -> None:
        """`delta` more (or fewer) lanes are busy."""

    def waited(self, queue_wait_s: float) -> None:
        """A query reached a lane after this wait."""

    def dispatched(self, size: int, reason: DispatchReason) -> None:
        """A batch of `size` queries started."""

    def searched(self, search_s: float) -> None:
        """A batch came back, well or not, after this time on its lane."""

    def rejected(self, reason: RejectReason) -> None:
        """A query was refused, or its deadline passed."""


P = TypeVar("P", bound=Batchable)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BatcherLimits:
    """Sizes of a batcher.

    `queue_limit` queries and `queue_work_limit` items to score (the sum of their costs) may wait.
    `batch_wait_s` > 0 holds a batch that is not full until its oldest query has waited that long;
    0 lets a free lane take what is there.
    """

    n_lanes: int
    max_batch: int
    queue_limit: int
    queue_work_limit: int
    batch_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """One query's result, how long it waited for a lane, and how long its batch was on it."""

    result: R
    queue_s: float
    search_s: float
    batch_size: int


@dataclass(eq=False, slots=True)
class _Entry(Generic[P, R]):
    query: P
    arrival_s: float
    deadline_s: float
    future: asyncio.Future[Answer[R]]


@dataclass(eq=False, slots=True)
class _Group(Generic[P, R]):
    """Queries that may share a batch, oldest first; a dict, so that any of them leaves in O(1)."""

    entries: OrderedDict[_Entry[P, R], None] = field(default_factory=OrderedDict)

    @property
    def oldest_arrival_s(self) -> float:
        return next(iter(self.entries)).arrival_s


class Batcher(Generic[P, R]):
    """Feeds `search(batch, lane)` from many concurrent `submit` calls.

    `search` is synchronous and gets 1 … `max_batch` queries of equal `compat`; it runs on
    `n_lanes` threads, never twice at a time on one lane, and returns one result a query.
    Must be created on the event loop that uses it.
    """

    def __init__(
        self,
        search: Callable[[Sequence[P], int], Sequence[R]],
        limits: BatcherLimits,
        *,
        observer: BatchObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], TimerHandle] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._search = search
        self._limits = limits
        self._observer = observer or BatchObserver()
        self._clock = clock
        self._call_later = call_later or loop.call_later
        self._lanes = [Lane(f"nann-lane-{lane}") for lane in range(limits.n_lanes)]
        self._free_lanes = list(range(limits.n_lanes))
        self._groups: dict[Hashable, _Group[P, R]] = {}
        self._depth = 0
        self._work = 0
        self._seconds_per_cost: float | None = None
        self._dispatch_is_due = False
        self._fill_timer: TimerHandle | None = None
        self._closing = False
        self._idle = asyncio.Event()

    @property
    def depth(self) -> int:
        """Queries that wait for a lane now."""
        return self._depth

    @property
    def lanes_busy(self) -> int:
        """Lanes that search now."""
        return len(self._lanes) - len(self._free_lanes)

    async def submit(self, query: P, *, deadline_s: float | None = None) -> Answer[R]:
        """Wait for a lane, search, and return this query's result.

        Cancelling the call takes the query out of the queue. `deadline_s` is in ``clock`` seconds.

        Raises:
            Overloaded: the queue is full; says when to come back.
            DeadlineExceeded: the deadline passed, in the queue or on the lane.
            NotReady: the batcher is closing.
            BackendError, InternalError: the batch this query was in failed.
        """
        entry = self._admit(query, float("inf") if deadline_s is None else deadline_s)
        expiry = None
        if deadline_s is not None:
            expiry = self._call_later(deadline_s - entry.arrival_s, lambda: self._expire(entry))
        try:
            return await entry.future
        finally:
            if expiry is not None:
                expiry.cancel()
            self._remove(entry)

    async def close(self) -> None:
        """Refuse new queries, finish the accepted ones, end the threads."""
        self._closing = True
        self._schedule_dispatch()
        while self._depth or self.lanes_busy:
            self._idle.clear()
            await self._idle.wait()
        for lane in self._lanes:
            lane.close()

    # Queue: everything that changes what waits.

    def _admit(self, query: P, deadline_s: float) -> _Entry[P, R]:
        now_s = self._clock()
        if self._closing:
            raise self._refusal("closing", NotReady("the server is shutting down"))
        if deadline_s <= now_s:
            raise self._refusal("expired", DeadlineExceeded("the deadline had passed on arrival"))
        if self._depth >= self._limits.queue_limit:
            raise self._refusal("queue_full", self._overloaded(f"{self._depth} queries are waiting"))
        # A query dearer than the whole bound is let in alone: refusing it would be refusing it for ever.
        if self._depth and self._work + query.cost > self._limits.queue_work_limit:
            raise self._refusal("work_full", self._overloaded(f"{self._work} items wait to be scored"))
        entry: _Entry[P, R] = _Entry(query, now_s, deadline_s, self._loop.create_future())
        self._groups.setdefault(query.compat, _Group()).entries[entry] = None
        self._count(entry, +1)
        self._schedule_dispatch()
        return entry

    def _refusal(self, reason: RejectReason, error: Exception) -> Exception:
        self._observer.rejected(reason)
        return error

    def _overloaded(self, why: str) -> Overloaded:
        message = f"the queue is full: {why}"
        if self._seconds_per_cost is None:  # no batch has come back yet, so there is no rate to go by
            return Overloaded(message)
        drain_s = self._work * self._seconds_per_cost / self._limits.n_lanes
        return Overloaded(message, retry_after_s=drain_s)

    def _remove(self, entry: _Entry[P, R]) -> bool:
        """Take `entry` out of the queue; False when it is not in it (any more)."""
        group = self._groups.get(entry.query.compat)
        if group is None or entry not in group.entries:
            return False
        del group.entries[entry]
        if not group.entries:
            del self._groups[entry.query.compat]
        self._count(entry, -1)
        return True

    def _count(self, entry: _Entry[P, R], delta: Literal[-1, 1]) -> None:
        self._depth += delta
        self._work += delta * entry.query.cost
        self._observer.queue_changed(delta)
        self._note_idleness()

    def _expire(self, entry: _Entry[P, R]) -> None:
        if entry.future.done():
            return
        where = "in the queue" if self._remove(entry) else "while its batch was searched"
        self._observer.rejected("expired")
        entry.future.set_exception(DeadlineExceeded(f"the deadline passed {where}"))

    # Dispatch: who goes next, and when.

    def _schedule_dispatch(self) -> None:
        """Dispatch once the loop has run what is ready, so that simultaneous arrivals share a batch."""
        if not self._dispatch_is_due:
            self._dispatch_is_due = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_is_due = False
        if self._fill_timer is not None:
            self._fill_timer.cancel()
            self._fill_timer = None
        while self._free_lanes and self._groups:
            now_s = self._clock()
            due = [(group, reason) for group in self._groups.values() if (reason := self._due(group, now_s))]
            if not due:
                self._start_fill_timer(now_s)
                return
            group, reason = min(due, key=lambda pair: pair[0].oldest_arrival_s)
            batch = self._take(group, now_s)
            if batch:
                self._start(batch, reason)

    def _due(self, group: _Group[P, R], now_s: float) -> DispatchReason | None:
        if len(group.entries) >= self._limits.max_batch:
            return "full"
        if self._closing:
            return "closing"
        if self._limits.batch_wait_s == 0:
            return "lane_free"
        waited_s = now_s - group.oldest_arrival_s
        return "fill_timer" if waited_s >= self._limits.batch_wait_s - _TIMER_SLACK_S else None

    def _start_fill_timer(self, now_s: float) -> None:
        oldest_s = min(group.oldest_arrival_s for group in self._groups.values())
        self._fill_timer = self._call_later(
            oldest_s + self._limits.batch_wait_s - now_s, self._schedule_dispatch
        )

    def _take(self, group: _Group[P, R], now_s: float) -> list[_Entry[P, R]]:
        """Up to a batch from the front of `group`, without those whose deadline has passed.

        A blocked loop runs timers late, so the deadline is looked at here too.
        """
        batch: list[_Entry[P, R]] = []
        while group.entries and len(batch) < self._limits.max_batch:
            entry = next(iter(group.entries))
            if entry.deadline_s <= now_s:
                self._expire(entry)
            else:
                self._remove(entry)
                batch.append(entry)
        return batch

    # On a lane and back.

    def _start(self, batch: list[_Entry[P, R]], reason: DispatchReason) -> None:
        lane = self._free_lanes.pop()
        started_s = self._clock()
        self._observer.lanes_changed(+1)
        self._observer.dispatched(len(batch), reason)
        for entry in batch:
            self._observer.waited(started_s - entry.arrival_s)
        results: list[R] = []
        queries = [entry.query for entry in batch]

        def search() -> None:
            results.extend(self._search(queries, lane))
            if len(results) != len(queries):
                raise InternalError(f"the engine gave {len(results)} results for {len(queries)} queries")

        self._lanes[lane].run(search, lambda error: self._finish(lane, batch, started_s, results, error))

    def _finish(
        self,
        lane: int,
        batch: list[_Entry[P, R]],
        started_s: float,
        results: list[R],
        error: BaseException | None,
    ) -> None:
        search_s = self._clock() - started_s
        self._free_lanes.append(lane)
        self._observer.lanes_changed(-1)
        self._observer.searched(search_s)
        if error is None:
            self._learn_rate(search_s, sum(entry.query.cost for entry in batch))
        for position, entry in enumerate(batch):
            if entry.future.done():  # expired or abandoned on the lane
                continue
            if error is not None:
                entry.future.set_exception(fresh_error(error))
            else:
                queue_s = started_s - entry.arrival_s
                entry.future.set_result(Answer(results[position], queue_s, search_s, len(batch)))
        self._note_idleness()
        self._schedule_dispatch()

    def _learn_rate(self, search_s: float, cost: int) -> None:
        seconds_per_cost = search_s / max(cost, 1)
        if self._seconds_per_cost is None:
            self._seconds_per_cost = seconds_per_cost
        else:
            self._seconds_per_cost += _RATE_SMOOTHING * (seconds_per_cost - self._seconds_per_cost)

    def _note_idleness(self) -> None:
        if not self._depth and not self.lanes_busy:
            self._idle.set()
