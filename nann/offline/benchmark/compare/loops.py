"""How a contender is timed: one request at a time, then every core busy.

Imports nothing but NumPy, because contenders with an environment of their own are timed by it too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["TimingBudget", "keep_busy", "one_at_a_time"]

# A percentile of fewer requests would be an accident, so a slow contender gets over its time for these.
_FEWEST_REQUESTS = 12


@dataclass(frozen=True, slots=True)
class TimingBudget:
    """How long one measurement of one round may last, and its shape.

    `requests` are sent one at a time for the latency, fewer where `latency_s` is over before. `load_s`
    is the length of the closed loop that shows the throughput.
    """

    requests: int = 100
    latency_s: float = 4.0
    load_s: float = 1.5
    warm_up_requests: int = 3


def one_at_a_time(
    answer: Callable[[Sequence[int]], object], rows: Sequence[int], budget: TimingBudget
) -> Float64[np.ndarray, " requests"]:
    """Seconds of each request, the next sent when the last has returned."""
    for row in rows[: budget.warm_up_requests]:
        answer([row])
    latencies: list[float] = []
    started_s = time.perf_counter()
    for row in islice(_around(rows), budget.requests):
        sent_s = time.perf_counter()
        answer([row])
        done_s = time.perf_counter()
        latencies.append(done_s - sent_s)
        if done_s - started_s > budget.latency_s and len(latencies) >= _FEWEST_REQUESTS:
            break
    return np.array(latencies)


def keep_busy(
    answer: Callable[[Sequence[int], int], object],
    rows: Sequence[int],
    budget: TimingBudget,
    *,
    lanes: int,
    batch: int,
) -> float:
    """Answers a second of `lanes` threads that each send `batch` requests again and again.

    ``answer(rows, lane)`` answers one batch. All lanes start together after a batch of warm-up each, and
    a batch that began in time is counted whole, with its time.
    """
    start = threading.Barrier(lanes)

    def load(lane: int) -> tuple[int, float, float]:
        batches = _batches(rows, batch, offset=lane * batch)
        try:
            answer(next(batches), lane)
        except BaseException:
            start.abort()  # the others would wait for ever
            raise
        start.wait()
        began_s = time.perf_counter()
        done, ended_s = 0, began_s
        while not done or ended_s - began_s < budget.load_s:
            chunk = next(batches)
            answer(chunk, lane)
            done += len(chunk)
            ended_s = time.perf_counter()
        return done, began_s, ended_s

    with ThreadPoolExecutor(lanes) as pool:
        results = list(pool.map(load, range(lanes)))
    # Each lane's own rate: at the end one lane is alone for less than a batch, which neither counts.
    return sum(done / (ended_s - began_s) for done, began_s, ended_s in results)


def _around(rows: Sequence[int]) -> Iterator[int]:
    while True:
        yield from rows


def _batches(rows: Sequence[int], batch: int, *, offset: int) -> Iterator[list[int]]:
    position = offset
    while True:
        yield [rows[(position + i) % len(rows)] for i in range(batch)]
        position += batch
