"""Two ways to load a target, and what is noted of each request.

Closed loop: a fixed number of requests is in flight, the next is sent when one returns. It shows the
throughput; its latency flatters a slow server, which is then asked less often.
Open loop: requests arrive at random times of a given rate (Poisson), whether the server keeps up or
not, and the latency counts from the scheduled arrival. Time that a request spends unsent because the
one before it was slow is therefore in its latency ("coordinated omission" is leaving it out).
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Protocol

import numpy as np

__all__ = [
    "OK",
    "Clock",
    "Load",
    "Outcome",
    "Sample",
    "Target",
    "WaitUntil",
    "closed_loop",
    "open_loop",
    "precise_timer",
    "throughput_qps",
    "wait_on_loop",
]

OK = "ok"
# A refusal comes back at once, so asking again at once would be a busy loop that starves the server.
_PAUSE_AFTER_FAILURE_S = 0.01

Clock = Callable[[], float]
WaitUntil = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a target tells of one request. `code` is `OK` or the stable word of the error.

    None where the target does not tell: `service_s` is the time on a lane, with its batch-mates,
    `queue_s` the wait for one, `n_scored` the items scored for this request, `batch_size` the queries
    of its batch.
    """

    code: str = OK
    service_s: float | None = None
    queue_s: float | None = None
    n_scored: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it should have been sent, when it was, and when its answer had come [s]."""

    scheduled_s: float
    sent_s: float
    done_s: float
    outcome: Outcome

    @property
    def latency_s(self) -> float:
        """From the scheduled arrival to the answer, so with every queue in it."""
        return self.done_s - self.scheduled_s


class Target(Protocol):
    """Something that answers requests. `send` reports failures in its outcome; it raises only for bugs."""

    async def send(self, i: int) -> Outcome:
        """Send request number `i` of the workload (any non-negative integer) and await its answer."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """Exactly one of `in_flight` (closed loop) and `rate_qps` (open loop, requests per second).

    Requests that belong to the first `warm_up_s` are sent and not measured. Then it lasts `duration_s`,
    or `requests` requests where that is given.
    """

    in_flight: int | None = None
    rate_qps: float | None = None
    warm_up_s: float = 1.0
    duration_s: float = 10.0
    requests: int | None = None

    def __post_init__(self) -> None:
        if (self.in_flight is None) == (self.rate_qps is None):
            raise ValueError("a load has either a number in flight or a rate")
        if (self.in_flight is not None and self.in_flight < 1) or (
            self.rate_qps is not None and not self.rate_qps > 0
        ):
            raise ValueError("requests in flight and rate must be positive")
        if self.warm_up_s < 0 or self.duration_s <= 0 or (self.requests is not None and self.requests < 1):
            raise ValueError("duration and requests must be positive, the warm-up not negative")

    @property
    def name(self) -> str:
        if self.in_flight is not None:
            return f"closed loop, {self.in_flight} in flight"
        return f"open loop, {self.rate_qps:g} requests/s"


async def closed_loop(target: Target, load: Load, *, clock: Clock = time.perf_counter) -> list[Sample]:
    """Samples of the requests sent after the warm-up, in the order of their answers."""
    assert load.in_flight is not None
    numbers = count()
    samples: list[Sample] = []
    warm_s = clock() + load.warm_up_s
    end_s = warm_s + load.duration_s
    measured = 0

    async def keep_one_in_flight() -> None:
        nonlocal measured
        while True:
            sent_s = clock()
            if measured >= load.requests if load.requests is not None else sent_s >= end_s:
                return
            warm = sent_s >= warm_s
            measured += warm
            outcome = await target.send(next(numbers))
            if warm:
                samples.append(Sample(sent_s, sent_s, clock(), outcome))
            if outcome.code != OK:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    with _no_collector():
        await _all(keep_one_in_flight() for _ in range(load.in_flight))
    return samples


def throughput_qps(load: Load, samples: Sequence[Sample]) -> float:
    """Answers a second to requests that `closed_loop` or `open_loop` measured; 0 for none.

    Of a closed loop so many are under way at any time, and by Little's law (L = λW) as many over their mean
    latency come back in a second. To count until its last answer would add the time in which fewer and fewer
    are under way, and to count those sent in its time would be off by one of few large calls. An open loop
    sends whatever comes back, and is over with its last answer.
    """
    answered = sum(sample.outcome.code == OK for sample in samples)
    if load.in_flight is not None and load.requests is None:
        n_failed = len(samples) - answered
        taken_s = sum(sample.latency_s for sample in samples) + n_failed * _PAUSE_AFTER_FAILURE_S
        return load.in_flight * answered / max(taken_s, 1e-9)
    first_s = min((sample.scheduled_s for sample in samples), default=0.0)
    last_s = max((sample.done_s for sample in samples), default=0.0)
    return answered / max(last_s - first_s, 1e-9)


async def open_loop(
    target: Target, load: Load, *, seed: int, wait_until: WaitUntil, clock: Clock = time.perf_counter
) -> list[Sample]:
    """Samples of the requests scheduled after the warm-up, in order of arrival; waits for the last answer.

    ``wait_until(t)`` sleeps until ``clock()`` reads `t` (see `precise_timer`).
    """
    offsets_s = list(_arrivals(load, seed))
    started_s = clock()
    warm_s = started_s + load.warm_up_s
    group: list[asyncio.Task[Sample]] = []

    async def request(i: int, scheduled_s: float) -> Sample:
        sent_s = clock()
        outcome = await target.send(i)
        return Sample(scheduled_s, sent_s, clock(), outcome)

    with _no_collector():
        try:
            for i, offset_s in enumerate(offsets_s):
                scheduled_s = started_s + offset_s
                if scheduled_s > clock():
                    await wait_until(scheduled_s)
                group.append(asyncio.ensure_future(request(i, scheduled_s)))
            samples = await asyncio.gather(*group)
        finally:
            for task in group:
                task.cancel()
    return [sample for sample in samples if sample.scheduled_s >= warm_s]


def _arrivals(load: Load, seed: int) -> Iterator[float]:
    """Seconds after the start of each arrival of a Poisson process."""
    assert load.rate_qps is not None
    rng = np.random.default_rng(seed)
    at_s, measured = 0.0, 0
    while True:
        at_s += float(rng.exponential(1.0 / load.rate_qps))
        if load.requests is None and at_s >= load.warm_up_s + load.duration_s:
            return
        measured += at_s >= load.warm_up_s
        yield at_s
        if load.requests is not None and measured >= load.requests:
            return


async def _all(coroutines: Iterator[Awaitable[None]]) -> None:
    """Run them at a time; when one fails the others are cancelled and the failure is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# One entry for each loop that runs.
_LOOPS: list[None] = []


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's garbage collector away: it looks at all that was imported, for 70 ms, and every request
    under way would count them.
    """
    _LOOPS.append(None)
    gc.disable()
    try:
        yield
    finally:
        _LOOPS.pop()
        if not _LOOPS:  # an overload may end while the calm after it is measured
            gc.enable()


async def wait_on_loop(until_s: float) -> None:
    """A `WaitUntil` over `time.perf_counter` by the event loop's own timers, up to a millisecond late.

    It wakes one thread where `precise_timer` wakes two, four times in all: for loads of which the generator
    must take little, and whose latencies are not of a millisecond.
    """
    # Loops round to the nearest millisecond: what is sent before its time would seem quick.
    while (ahead_s := until_s - time.perf_counter()) > 0:  # noqa: ASYNC110  # for the time, not for anybody
        await asyncio.sleep(max(ahead_s, 0.001))


@contextmanager
def precise_timer() -> Iterator[WaitUntil]:
    """A `WaitUntil` over `time.perf_counter`, for one waiter at a time on the running event loop.

    Event loops round timers to the millisecond, which is as long as a search; a thread's sleep is
    exact to some 0.1 ms.
    """
    loop = asyncio.get_running_loop()
    jobs: SimpleQueue[tuple[float, asyncio.Future[None]] | None] = SimpleQueue()

    def wake(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)

    def sleep() -> None:
        while (job := jobs.get()) is not None:
            until_s, future = job
            time.sleep(max(0.0, until_s - time.perf_counter()))
            if loop.is_closed():
                return
            loop.call_soon_threadsafe(wake, future)

    async def wait_until(until_s: float) -> None:
        future: asyncio.Future[None] = loop.create_future()
        jobs.put((until_s, future))
        await future

    thread = threading.Thread(target=sleep, name="nann-benchmark-timer", daemon=True)
    thread.start()
    try:
        yield wait_until
    finally:
        jobs.put(None)
        thread.join()
