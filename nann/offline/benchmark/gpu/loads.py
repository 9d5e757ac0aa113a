"""Load on an engine behind the service's batcher, in process: capacity, and latency at a stated rate.

A request is one query or a group of them. The batcher is the command's to bring (`Submit`): nothing here
knows the service.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nann.engine.errors import RetrievalError
from nann.offline.benchmark.gpu.measure import K
from nann.offline.benchmark.gpu.quality import Ranked, recall
from nann.offline.benchmark.load import (
    OK,
    Load,
    Outcome,
    Sample,
    closed_loop,
    open_loop,
    precise_timer,
    throughput_qps,
)

__all__ = ["GroupTarget", "LoadFigures", "Served", "Submit", "capacity", "rate"]

_FEWEST_GROUPS = 4

Submit = Callable[[Sequence[int]], Awaitable[Sequence[Any]]]
"""Numbers of users -> their `Hits`; raises `RetrievalError`."""


@dataclass(frozen=True, slots=True)
class Served:
    """An engine behind a batcher: ``one`` takes a single query and checks it, as a request would be;
    ``many`` takes queries that were checked before. Counters since the start: `searches` of the engine, and
    its own kernels' `launches`."""

    one: Submit
    many: Submit
    searches: Callable[[], int]
    launches: Callable[[], int]


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What one load came to. Latencies count from the scheduled arrival (open loop), queueing included;
    `late_ms` is the 99th percentile of how late the generator itself sent."""

    loop: str
    group: int
    offered_qps: float | None
    qps: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    late_ms: float
    queries: int
    failures: int
    mean_items_scored: float
    pairs_per_s: float
    recall: float | None
    mean_batch: float
    launches_a_search: float


class GroupTarget:
    """Sends users in groups, in turn, and keeps each one's last answer. Groups of one are checked first
    when `single`."""

    def __init__(self, served: Served, *, users: int, group: int, single: bool = False) -> None:
        self._submit = served.one if single else served.many
        self.served = served
        self._users = users
        self.group = group
        self.queries = 0
        self._answers = Ranked.empty(users, K)
        self._answered = np.zeros(users, dtype=np.bool_)

    async def send(self, i: int) -> Outcome:
        """Send group number `i`; its outcome has the mean number of items scored."""
        chosen = [(i * self.group + j) % self._users for j in range(self.group)]
        try:
            hits = await self._submit(chosen)
        except RetrievalError as error:
            return Outcome(type(error).__name__)
        self.queries += len(chosen)
        for user, found in zip(chosen, hits, strict=True):
            self._answers.put(user, found)
            self._answered[user] = True
        return Outcome(n_scored=round(sum(found.n_scored for found in hits) / len(hits)))

    def recall(self, exact: Ranked) -> float | None:
        """Mean recall over the users that were answered; None when nobody was."""
        if not self._answered.any():
            return None
        return float(recall(self._answers.some(self._answered), exact.some(self._answered)).mean())


@dataclass(frozen=True, slots=True)
class _Counters:
    queries: int
    searches: int
    launches: int

    @classmethod
    def of(cls, target: GroupTarget) -> _Counters:
        return cls(target.queries, target.served.searches(), target.served.launches())


async def capacity(target: GroupTarget, exact: Ranked, *, in_flight: int, seconds: float) -> LoadFigures:
    """Closed loop with `in_flight` groups: how much comes back a second."""
    load = Load(in_flight=in_flight, warm_up_s=0.25 * seconds, duration_s=0.75 * seconds)
    before = _Counters.of(target)
    samples = await closed_loop(target, load)
    if not samples:  # one search takes longer than all of that
        load = Load(in_flight=in_flight, warm_up_s=0.0, requests=in_flight)
        samples = await closed_loop(target, load)
    return _figures(target, exact, load, None, samples, before)


async def rate(
    target: GroupTarget, exact: Ranked, *, qps: float, seconds: float, seed: int = 0
) -> LoadFigures:
    """Open loop: groups arrive at random times, `qps` queries a second in all."""
    groups_per_s = qps / target.group
    # Where hardly anything would arrive in that time, some groups are waited for.
    few = _FEWEST_GROUPS if 0.8 * seconds * groups_per_s < _FEWEST_GROUPS else None
    load = Load(rate_qps=groups_per_s, warm_up_s=0.2 * seconds, duration_s=0.8 * seconds, requests=few)
    before = _Counters.of(target)
    with precise_timer() as wait_until:
        samples = await open_loop(target, load, seed=seed, wait_until=wait_until)
    return _figures(target, exact, load, qps, samples, before)


def _figures(
    target: GroupTarget,
    exact: Ranked,
    load: Load,
    offered_qps: float | None,
    samples: Sequence[Sample],
    before: _Counters,
) -> LoadFigures:
    answered = [sample for sample in samples if sample.outcome.code == OK]
    nothing = [float("nan")]
    latency_ms = [1e3 * sample.latency_s for sample in answered] or nothing
    late_ms = [1e3 * (sample.sent_s - sample.scheduled_s) for sample in samples] or nothing
    qps = target.group * throughput_qps(load, samples)
    scored = [sample.outcome.n_scored or 0 for sample in answered]
    after = _Counters.of(target)
    searches = max(1, after.searches - before.searches)
    mean_scored = float(np.mean(scored)) if scored else 0.0
    p50, p95, p99 = (float(np.percentile(latency_ms, point)) for point in (50, 95, 99))
    return LoadFigures(
        loop="open" if load.in_flight is None else "closed",
        group=target.group,
        offered_qps=offered_qps,
        qps=qps,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        late_ms=float(np.percentile(late_ms, 99)),
        queries=target.group * len(answered),
        failures=target.group * (len(samples) - len(answered)),
        mean_items_scored=mean_scored,
        pairs_per_s=qps * mean_scored,
        recall=target.recall(exact),
        mean_batch=(after.queries - before.queries) / searches,
        launches_a_search=(after.launches - before.launches) / searches,
    )
