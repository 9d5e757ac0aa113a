"""Closed and open loop against simulated servers, on an event loop whose time is simulated too."""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import uvloop
from typing_extensions import override

from nann.offline.benchmark.load import (
    Load,
    Outcome,
    Sample,
    closed_loop,
    open_loop,
    throughput_qps,
    wait_on_loop,
)

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Never blocks; tells how long it was asked to."""

    asked_s = 0.0

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.asked_s = timeout or 0.0
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only by waiting, and waiting takes no time."""

    def __init__(self) -> None:
        self._virtual_s = 0.0
        self._no_waiting = _NoWaiting()
        super().__init__(self._no_waiting)

    @override
    def time(self) -> float:
        return self._virtual_s

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        self._virtual_s += self._no_waiting.asked_s


def simulate(experiment: Callable[[], Awaitable[T]]) -> T:
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(experiment())  # type: ignore[arg-type]
    finally:
        loop.close()


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def wait_until(until_s: float) -> None:
    await asyncio.sleep(max(0.0, until_s - now_s()))


class OneByOneServer:
    """Answers one request at a time, each in `service_s`, those of `slow` in their own time."""

    def __init__(self, service_s: float, slow: dict[int, float] | None = None) -> None:
        self._service_s = service_s
        self._slow = slow or {}
        self._turn = asyncio.Lock()
        self.in_flight = 0
        self.most_in_flight = 0

    async def send(self, i: int) -> Outcome:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        arrived_s = now_s()
        async with self._turn:
            queue_s = now_s() - arrived_s
            service_s = self._slow.get(i, self._service_s)
            await asyncio.sleep(service_s)
        self.in_flight -= 1
        return Outcome(service_s=service_s, queue_s=queue_s, n_scored=i, batch_size=1)


def run_closed(load: Load, server: OneByOneServer) -> list[Sample]:
    return simulate(lambda: closed_loop(server, load, clock=now_s))


def run_open(load: Load, server: OneByOneServer, seed: int = 0) -> list[Sample]:
    return simulate(lambda: open_loop(server, load, seed=seed, wait_until=wait_until, clock=now_s))


def test_closed_loop_keeps_its_number_in_flight() -> None:
    server = OneByOneServer(0.01)
    samples = run_closed(Load(in_flight=4, warm_up_s=0, requests=50), server)
    assert server.most_in_flight == 4
    assert len(samples) == 50
    # Four share one server, so each waits for three others; the first three came when it was idle.
    assert [sample.latency_s for sample in samples[3:]] == pytest.approx([0.04] * 47)


def test_closed_loop_leaves_the_warm_up_out() -> None:
    samples = run_closed(Load(in_flight=1, warm_up_s=1, duration_s=2), OneByOneServer(0.1, slow={0: 0.5}))
    assert min(sample.sent_s for sample in samples) >= 1
    assert max(sample.sent_s for sample in samples) < 3
    assert len(samples) == pytest.approx(20, abs=1)
    assert all(sample.latency_s == pytest.approx(0.1) for sample in samples)


@pytest.mark.parametrize(("in_flight", "service_s"), [(1, 0.02), (8, 0.02), (64, 0.02), (2, 0.7), (8, 1.0)])
def test_the_throughput_of_a_closed_loop_is_the_servers_however_many_wait(
    in_flight: int, service_s: float
) -> None:
    load = Load(in_flight=in_flight, warm_up_s=2, duration_s=4)
    qps = throughput_qps(load, run_closed(load, OneByOneServer(service_s)))
    assert qps == pytest.approx(1 / service_s, rel=0.001)


def test_an_open_loop_that_is_more_than_the_server_can_do_shows_what_it_can() -> None:
    load = Load(rate_qps=100, warm_up_s=0, duration_s=10)
    assert throughput_qps(load, run_open(load, OneByOneServer(0.02))) == pytest.approx(50, rel=0.02)
    assert throughput_qps(load, []) == 0


def test_only_answers_are_throughput() -> None:
    samples = [Sample(0, 0, 1, Outcome()), Sample(0, 0, 1, Outcome("overloaded"))]
    # Whose request failed pauses for 10 ms, too.
    assert throughput_qps(Load(in_flight=2, duration_s=4), samples) == pytest.approx(2 / 2.01)
    assert throughput_qps(Load(in_flight=2, duration_s=4), []) == 0


def test_closed_loop_pauses_after_a_refusal() -> None:
    class Refusing:
        async def send(self, i: int) -> Outcome:
            return Outcome("overloaded")

    samples = simulate(
        lambda: closed_loop(Refusing(), Load(in_flight=1, warm_up_s=0, duration_s=1), clock=now_s)
    )
    assert 50 < len(samples) < 150
    assert {sample.outcome.code for sample in samples} == {"overloaded"}


def test_open_loop_counts_latency_from_the_scheduled_arrival() -> None:
    """A server that stands still for a second makes all who arrive meanwhile wait, though none is slow."""
    samples = run_open(Load(rate_qps=100, warm_up_s=0, duration_s=3), OneByOneServer(0.001, slow={100: 1.0}))
    stalled = next(sample for sample in samples if sample.outcome.n_scored == 100)
    victims = [s for s in samples if stalled.sent_s < s.scheduled_s < stalled.done_s - 0.1]
    assert len(victims) > 50
    for sample in victims:
        assert sample.latency_s >= stalled.done_s - sample.scheduled_s
        assert sample.outcome.service_s == 0.001


def test_open_loop_counts_what_the_generator_itself_was_late() -> None:
    async def late(until_s: float) -> None:
        await asyncio.sleep(until_s - now_s() + 0.02)

    server_load = Load(rate_qps=10, warm_up_s=0, requests=20)
    samples = simulate(
        lambda: open_loop(OneByOneServer(0.0), server_load, seed=0, wait_until=late, clock=now_s)
    )
    lateness = [sample.sent_s - sample.scheduled_s for sample in samples]
    assert max(lateness) == pytest.approx(0.02)
    assert [sample.latency_s for sample in samples] == pytest.approx(lateness)


def test_open_loop_arrivals_are_a_poisson_process_of_the_rate() -> None:
    samples = run_open(Load(rate_qps=200, warm_up_s=0, duration_s=50), OneByOneServer(0.0))
    gaps = np.diff([sample.scheduled_s for sample in samples])
    assert len(samples) == pytest.approx(10_000, rel=0.05)
    # Exponential gaps: the standard deviation equals the mean.
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)


def test_open_loop_is_repeatable_and_excludes_the_warm_up() -> None:
    load = Load(rate_qps=50, warm_up_s=1, requests=30)
    first, again, other = (
        [sample.scheduled_s for sample in run_open(load, OneByOneServer(0.0), seed)] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert len(first) == 30
    assert min(first) >= 1


def test_a_bug_in_a_target_is_raised() -> None:
    class Broken:
        async def send(self, i: int) -> Outcome:
            raise ZeroDivisionError

    for experiment in (
        lambda: closed_loop(Broken(), Load(in_flight=2, requests=5), clock=now_s),
        lambda: open_loop(
            Broken(), Load(rate_qps=10, requests=5), seed=0, wait_until=wait_until, clock=now_s
        ),
    ):
        with pytest.raises(ZeroDivisionError):
            simulate(experiment)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"in_flight": 1, "rate_qps": 1.0},
        {"in_flight": 0},
        {"rate_qps": 0.0},
        {"rate_qps": float("nan")},
        {"in_flight": 1, "duration_s": 0.0},
        {"in_flight": 1, "requests": 0},
        {"in_flight": 1, "warm_up_s": -1.0},
    ],
)
def test_impossible_loads_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be positive|either"):
        Load(**fields)  # type: ignore[arg-type]


def test_no_garbage_is_collected_while_any_loop_runs() -> None:
    seen: list[bool] = []

    async def send(_number: int) -> Outcome:
        seen.append(gc.isenabled())
        await asyncio.sleep(0.1)
        return Outcome()

    async def two_loops() -> None:
        target = SimpleNamespace(send=send)
        loads = [Load(in_flight=1, warm_up_s=0.0, duration_s=seconds) for seconds in (1.0, 3.0)]
        await asyncio.gather(*(closed_loop(target, load, clock=now_s) for load in loads))

    simulate(two_loops)
    assert len(seen) > 30
    assert not any(seen)
    assert gc.isenabled()


def test_the_loops_own_timers_never_wake_before_their_time() -> None:
    async def early() -> list[float]:
        found = []
        for _ in range(40):
            until_s = time.perf_counter() + 0.0004
            await asyncio.wait_for(wait_on_loop(until_s), 5)
            found.append(until_s - time.perf_counter())
        await wait_on_loop(time.perf_counter() - 1)  # what is past is not waited for
        return found

    assert max(uvloop.run(early())) <= 0
