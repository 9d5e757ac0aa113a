"""Queries wait here for a lane, and travel in batches. The only place where anything waits.

    submit ──> admitted? ──> `WaitingQueue`, FIFO in compatible groups ──> a free lane takes a batch
               no: refused at once     expired or abandoned: leaves        │ (thread; engine.search)
                                                                           └──> each waiter's call

All state belongs to the event loop, so there is no lock. Nothing polls: a dispatch is caused by an
arrival, by a lane that became free, or by the fill timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

from nann.engine.errors import DeadlineExceeded, NotReady, Overloaded
from nann.service.entry import Answer, Batchable, Call, DispatchReason, Entry, P, R
from nann.service.errors import InternalError, fresh_error
from nann.service.flights import Flight, Flights
from nann.service.lane import Lane
from nann.service.rotation import Rotation
from nann.service.search_rate import SearchRate
from nann.service.waiting import Group, RejectReason, WaitingQueue

__all__ = [
    "Answer",
    "BatchObserver",
    "Batchable",
    "Batcher",
    "BatcherLimits",
    "DispatchReason",
    "RejectReason",
]

# The most patient of the last hundred or so queries stands for callers whose deadline has not been read. They
# are refused from this share of it on: closer to it nearly all are read, checked, and then refused all the
# same, at ten times the cost, or let in and dropped when it has passed.
_PATIENCE_DECAY = 0.98
_PATIENCE_SHARE = 0.5
_MOST_PATIENCE_S = 3600.0
# uvloop rounds timers to the nearest millisecond, so one may fire this much early.
_TIMER_SLACK_S = 0.0005
_NEVER_S = float("inf")


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


@dataclass(frozen=True, slots=True)
class BatcherLimits:
    """Sizes of a batcher.

    A batch holds at most `max_batch` queries, and more than one only while their costs add up to at
    most `batch_work_limit` items to score, so that no batch keeps a lane for long. `queue_limit`
    queries and `queue_work_limit` items may wait. `batch_wait_s` > 0 holds a batch that is not full
    until its oldest query has waited that long; 0 lets a free lane take what is there. `lane_groups`
    names the device of each lane (default: one for all): a search that fails takes the lanes of its
    device out of the rotation (`Rotation`). A lane that is busy takes up to `lane_depth` - 1 batches more,
    full ones of the kind that it searches, so that it goes on with the next at once.
    """

    n_lanes: int
    max_batch: int
    queue_limit: int
    queue_work_limit: int
    batch_work_limit: int
    batch_wait_s: float = 0.0
    lane_groups: tuple[Hashable, ...] | None = None
    lane_depth: int = 1


class Batcher(Generic[P, R]):
    """Feeds `search(batch, lane)` from many concurrent `submit` calls.

    `search` is synchronous and gets 1 … `max_batch` queries of equal `compat`; it runs on
    `n_lanes` · `lane_depth` threads, never more than `lane_depth` times at once for one lane, and returns
    one result a query.
    `on_lanes` hears how many lanes are proven (see `Rotation`) whenever that changes. Must be created
    on the event loop that uses it.
    """

    def __init__(
        self,
        search: Callable[[Sequence[P], int], Sequence[R]],
        limits: BatcherLimits,
        *,
        observer: BatchObserver | None = None,
        on_lanes: Callable[[int], None] | None = None,
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
        lanes, depth = range(limits.n_lanes), limits.lane_depth
        self._threads = [[Lane(f"nann-lane-{lane}") for _ in range(depth)] for lane in lanes]
        self._flights: Flights[P, R] = Flights(limits.n_lanes)
        self._rotation = Rotation(limits.lane_groups or ("all",) * limits.n_lanes, depth=depth)
        self._on_lanes = on_lanes
        self._queue: WaitingQueue[Entry[P, R]] = WaitingQueue(
            limit=limits.queue_limit, work_limit=limits.queue_work_limit
        )
        self._rate = SearchRate(max_batch=limits.max_batch, batch_work_limit=limits.batch_work_limit)
        self._usual_cost = 0.0
        self._patience_s = _MOST_PATIENCE_S
        self._dispatch_is_due = False
        self._fill_timer: TimerHandle | None = None
        self._closing = False
        self._idle = asyncio.Event()

    @property
    def depth(self) -> int:
        """Queries that wait for a lane now."""
        return self._queue.depth

    @property
    def lanes_busy(self) -> int:
        """Lanes that search now."""
        return self._rotation.n_busy

    def has_room(self, *, ahead: int = 0, unread_s: float = 0.0) -> bool:
        """Whether a query that comes alone would be let in now, if it is no more patient than others.

        `ahead` queries have been let in before it that are not here yet; it has waited for `unread_s`.
        """
        return self._unread_refusal(ahead, unread_s) is None

    def refuse(self, *, ahead: int = 0, unread_s: float = 0.0) -> None:
        """Raise the `Overloaded` of a query that nobody has read, and count it; not when there is room."""
        refusal = self._unread_refusal(ahead, unread_s)
        if refusal is not None:
            reason, why = refusal
            raise self._refusal(reason, 1, self._overloaded(why))

    async def submit(self, query: P, *, deadline_s: float | None = None) -> Answer[R]:
        """Wait for a lane, search, and return this query's result.

        Cancelling the call takes the query out of the queue. `deadline_s` is in ``clock`` seconds.

        Raises:
            Overloaded: the queue is full, or too long for the deadline; says when to come back.
            DeadlineExceeded: the deadline passed, in the queue or on the lane.
            NotReady: the batcher is closing.
            BackendError, InternalError: the batch this query was in failed.
        """
        (outcome,) = await self._answered(self._admit([query], deadline_s, bulk=False))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def submit_many(
        self, queries: Sequence[P], *, deadline_s: float | None = None
    ) -> list[Answer[R] | Exception]:
        """Search all of `queries`, as bulk: behind those that came alone. One outcome a query, in order.

        They are let in or refused together; where `submit` raises later, the outcome is that error.
        Cancelling the call takes those that still wait out of the queue.

        Raises:
            Overloaded, DeadlineExceeded, NotReady: on arrival, and then none of them was let in.
        """
        return await self._answered(self._admit(queries, deadline_s, bulk=True)) if queries else []

    async def probe(self, query: P, *, deadline_s: float) -> None:
        """Search `query` alone on every free lane that is in doubt; those that succeed are proven again.

        Raises what the first of the others raises.
        """
        calls = []
        for lane in () if self._closing else self._rotation.doubted:
            entry = Entry(query, self._new_call(1, deadline_s, bulk=False), 0)
            self._start(lane, [entry], "probe")
            calls.append(self._answered([entry]))
        for (outcome,) in await asyncio.gather(*calls):
            if isinstance(outcome, Exception):
                raise outcome

    async def search_if_idle(self, query: P) -> Answer[R] | None:
        """Search `query` alone, if nobody waits and a lane is to spare; else None, at once.

        It never joins the queue, and no time that it takes counts as waiting, as search time or in the
        service rate: those are of queries that somebody waits for.

        Raises:
            BackendError, InternalError: the search failed.
        """
        lane = None if self._closing or self.depth else self._rotation.spare_lane()
        if lane is None:
            return None
        entry = Entry(query, self._new_call(1, _NEVER_S, bulk=True), 0)
        self._start(lane, [entry], "shadow")
        (outcome,) = await self._answered([entry])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Refuse new queries, finish the accepted ones, end the threads."""
        self._closing = True
        self._schedule_dispatch()
        while self.depth or self.lanes_busy:
            self._idle.clear()
            await self._idle.wait()
        for threads in self._threads:
            for thread in threads:
                thread.close()

    # Calls: from their admission to their outcomes.

    def _admit(self, queries: Sequence[P], deadline_s: float | None, *, bulk: bool) -> list[Entry[P, R]]:
        call = self._new_call(len(queries), _NEVER_S if deadline_s is None else deadline_s, bulk=bulk)
        entries = [Entry(query, call, position) for position, query in enumerate(queries)]
        self._check_admission(entries, call)
        for entry in entries:
            self._queue.add(entry)
        self._observer.queue_changed(len(entries))
        self._schedule_dispatch()
        return entries

    def _new_call(self, n: int, deadline_s: float, *, bulk: bool) -> Call[R]:
        return Call(
            n,
            arrival_s=self._clock(),
            deadline_s=deadline_s,
            bulk=bulk,
            done=self._loop.create_future(),
        )

    def _check_admission(self, entries: Sequence[Entry[P, R]], call: Call[R]) -> None:
        n = len(entries)
        if self._closing:
            raise self._refusal("closing", n, NotReady("the server is shutting down"))
        if call.deadline_s <= call.arrival_s:
            raise self._refusal("expired", n, DeadlineExceeded("the deadline had passed on arrival"))
        patience_s = min(call.deadline_s - call.arrival_s, _MOST_PATIENCE_S)
        self._patience_s = max(patience_s, _PATIENCE_DECAY * self._patience_s)
        cost = sum(entry.cost for entry in entries)
        self._usual_cost = cost / n
        refusal = self._queue.refusal(n=n, cost=cost, bulk=call.bulk)
        if refusal is not None:
            reason, why = refusal
            raise self._refusal(reason, n, self._overloaded(f"the queue is full: {why}"))
        answer_s = self._expected_answer_s(cost, cost / n, bulk=call.bulk)
        if self.depth and call.arrival_s + answer_s >= call.deadline_s:
            # It would expire, in the queue or on a lane; told now, the caller can still go elsewhere.
            why = f"an answer takes about {answer_s * 1e3:.0f} ms, longer than the deadline allows"
            raise self._refusal("too_late", n, self._overloaded(why))

    def _unread_refusal(self, ahead: int, unread_s: float) -> tuple[RejectReason, str] | None:
        """Why a query that comes alone need not be read; None where it may be let in."""
        cost = self._queue.work / self.depth if self.depth else self._usual_cost
        ahead_cost = ahead * cost
        refusal = self._queue.refusal(n=1, cost=1, bulk=False, ahead=ahead, ahead_cost=ahead_cost)
        if refusal is not None:
            reason, why = refusal
            return reason, f"the queue is full: {why}"
        if cost and (self.depth or ahead or unread_s):  # else nobody has asked for anything yet
            answer_s = unread_s + self._expected_answer_s(cost, cost, bulk=False, ahead_cost=ahead_cost)
            if answer_s >= _PATIENCE_SHARE * self._patience_s:
                return "too_late", f"an answer takes about {answer_s * 1e3:.0f} ms"
        return None

    def _refusal(self, reason: RejectReason, n: int, error: Exception) -> Exception:
        for _ in range(n):
            self._observer.rejected(reason)
        return error

    def _overloaded(self, why: str) -> Overloaded:
        if self._rate.seconds_per_cost is None:  # no batch has come back yet, so there is no rate to go by
            return Overloaded(why)
        work_s = self._queue.work * self._rate.seconds_per_cost
        return Overloaded(why, retry_after_s=work_s / self._limits.n_lanes)

    def _expected_answer_s(
        self, cost: float, mean_cost: float, *, bulk: bool, ahead_cost: float = 0.0
    ) -> float:
        """How long queries of `cost` together would be under way: waiting, and on a lane."""
        n_lanes = self._limits.n_lanes
        work = self._queue.work_before(bulk=bulk) + ahead_cost + self._flights.work_ahead
        wait_s = self._rate.time_of(work, mean_cost) / n_lanes
        batch_s = self._rate.time_of_batch(self._queue.work + ahead_cost + cost, mean_cost)
        # The batch that is on the next lane is half done on average.
        return wait_s + batch_s * (1 + 0.5 / n_lanes)

    async def _answered(self, entries: Sequence[Entry[P, R]]) -> list[Answer[R] | Exception]:
        call = entries[0].call
        expiry = None
        if call.deadline_s != _NEVER_S:
            expiry = self._call_later(call.deadline_s - call.arrival_s, lambda: self._expire(entries))
        try:
            await call.done
        finally:
            if expiry is not None:
                expiry.cancel()
            if call.unfinished:  # abandoned
                for entry in entries:
                    self._leave(entry)
        return [outcome for outcome in call.outcomes if outcome is not None]

    def _leave(self, entry: Entry[P, R]) -> bool:
        """Take `entry` out of the queue; False when it is not in it (any more)."""
        if not self._queue.remove(entry):
            return False
        self._observer.queue_changed(-1)
        self._note_idleness()
        return True

    def _expire(self, entries: Sequence[Entry[P, R]]) -> None:
        for entry in entries:
            if not entry.is_settled:
                where = "in the queue" if self._leave(entry) else "while its batch was searched"
                self._observer.rejected("expired")
                entry.settle(DeadlineExceeded(f"the deadline passed {where}"))

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
        while self.depth:
            now_s = self._clock()
            lane = self._rotation.next_lane()
            if lane is not None:
                group = self._queue.next_group(lambda group: self._due(group, now_s) is not None)  # noqa: B023
                if group is None:
                    self._start_fill_timer(now_s)
                    return
            else:
                group = self._queue.next_group(lambda group: self._lane_ahead(group) is not None)
                if group is None:
                    return
                lane = self._lane_ahead(group)
            reason = self._due(group, now_s)
            assert lane is not None and reason is not None
            batch = self._take(group, now_s, self._flights.remaining_s(lane, now_s, self._rate))
            if batch:
                self._start(lane, batch, reason)

    def _due(self, group: Group[Entry[P, R]], now_s: float) -> DispatchReason | None:
        if self._is_full(group):
            return "full"
        if self._closing:
            return "closing"
        if self._limits.batch_wait_s == 0:
            return "lane_free"
        waited_s = now_s - group.oldest.arrival_s
        return "fill_timer" if waited_s >= self._limits.batch_wait_s - _TIMER_SLACK_S else None

    def _is_full(self, group: Group[Entry[P, R]]) -> bool:
        return len(group.waiters) >= self._limits.max_batch or group.work >= self._limits.batch_work_limit

    def _lane_ahead(self, group: Group[Entry[P, R]]) -> int | None:
        """The busy lane that a full batch may wait on: one that searches its like, which takes no longer."""
        if not self._is_full(group):
            return None
        return self._flights.first_begun(self._rotation.lanes_with_room(), group.oldest.compat)

    def _start_fill_timer(self, now_s: float) -> None:
        oldest_s = min(group.oldest.arrival_s for group in self._queue.groups())
        self._fill_timer = self._call_later(
            oldest_s + self._limits.batch_wait_s - now_s, self._schedule_dispatch
        )

    def _take(self, group: Group[Entry[P, R]], now_s: float, wait_s: float) -> list[Entry[P, R]]:
        """Up to a batch from the front of `group`, without those whose deadline would pass on the lane.

        The lane is free in `wait_s`.
        The last one is tried in any case: only a search corrects what is expected of searches.
        """
        batch: list[Entry[P, R]] = []
        work = 0
        done_s = now_s + wait_s + self._rate.time_of_batch(group.work, group.oldest.cost)
        while group.waiters and len(batch) < self._limits.max_batch:
            entry = group.oldest
            if entry.is_settled:  # abandoned, by a caller whose task has not run since
                self._leave(entry)
                continue
            if entry.call.deadline_s <= (done_s if len(group.waiters) > 1 else now_s):
                self._expire([entry])
                continue
            if batch and work + entry.cost > self._limits.batch_work_limit:
                break
            self._leave(entry)
            batch.append(entry)
            work += entry.cost
        self._queue.dispatched(work, bulk=group.bulk)
        return batch

    # On a lane and back.

    def _start(self, lane: int, batch: list[Entry[P, R]], reason: DispatchReason) -> None:
        self._rotation.take(lane)
        flight = Flight(batch, reason)
        self._flights.add(lane, flight)
        self._observer.dispatched(len(batch), reason)
        if self._flights.first(lane) is flight:
            self._observer.lanes_changed(+1)
            self._begin(flight)
        results: list[R] = []
        queries = [entry.query for entry in batch]

        def search() -> None:
            results.extend(self._search(queries, lane))
            if len(results) != len(queries):
                raise InternalError(f"the engine gave {len(results)} results for {len(queries)} queries")

        def finish(error: BaseException | None) -> None:
            begun_s = self._begin(flight)  # where the batch before it is late in telling that it has ended
            search_s = self._clock() - begun_s
            self._flights.remove(lane, flight)
            self._give_back(lane, succeeded=error is None)
            if reason != "shadow":
                self._observer.searched(search_s)
            if error is None and reason != "shadow":
                self._rate.learn(search_s, flight.work)
            # The lane comes first: what the answers cause would run before a dispatch that was scheduled.
            self._dispatch()
            for position, entry in enumerate(batch):
                if entry.is_settled:  # expired or abandoned on the lane
                    continue
                queue_s = begun_s - entry.arrival_s
                entry.settle(
                    fresh_error(error)
                    if error is not None
                    else Answer(results[position], queue_s, search_s, len(batch), reason)
                )
            self._note_idleness()

        next(thread for thread in self._threads[lane] if not thread.busy).run(search, finish)

    def _begin(self, flight: Flight[P, R]) -> float:
        """Since when its lane searches this batch: now, if it has not begun."""
        if flight.begun_s is None:
            flight.begun_s = self._clock()
            if flight.reason != "shadow":
                for entry in flight.batch:
                    self._observer.waited(flight.begun_s - entry.arrival_s)
        return flight.begun_s

    def _give_back(self, lane: int, *, succeeded: bool) -> None:
        before = self._rotation.n_proven
        self._rotation.give_back(lane, succeeded=succeeded)
        if (following := self._flights.first(lane)) is not None:
            self._begin(following)
        else:
            self._observer.lanes_changed(-1)
        if self._on_lanes is not None and self._rotation.n_proven != before:
            self._on_lanes(self._rotation.n_proven)

    def _note_idleness(self) -> None:
        if not self.depth and not self.lanes_busy:
            self._idle.set()
