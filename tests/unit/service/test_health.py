from __future__ import annotations

import asyncio

import pytest

from nann.engine.errors import BackendError
from nann.service.health import Health, HealthState, keep_recovering


def test_the_life_of_a_process() -> None:
    health = Health()
    seen: list[bool] = []
    health.subscribe(seen.append)
    assert (health.state, health.ready) == (HealthState.LOADING, False)
    health.loaded()
    health.loaded()
    assert (health.state, health.ready) == (HealthState.READY, True)
    health.draining()
    assert (health.state, health.ready) == (HealthState.DRAINING, False)
    health.loaded()
    health.lanes_changed("nann", 1, proven=2, lanes=2)
    assert health.state is HealthState.DRAINING
    assert seen == [False, True, False]


def test_a_model_is_impaired_while_none_of_its_lanes_works() -> None:
    health = Health()
    health.loaded()
    health.lanes_changed("a", 1, proven=0, lanes=2)
    health.lanes_changed("b", 1, proven=0, lanes=2)
    assert (health.state, health.impaired_models) == (HealthState.IMPAIRED, {"a", "b"})
    health.lanes_changed("a", 1, proven=1, lanes=2)
    health.lanes_changed("c", 1, proven=1, lanes=2)
    assert (health.ready, health.impaired_models) == (False, {"b"})
    health.lanes_changed("b", 1, proven=2, lanes=2)
    assert (health.ready, health.doubted) == (True, [("a", 1), ("c", 1)])


def test_a_version_that_is_gone_impairs_nothing() -> None:
    health = Health()
    health.loaded()
    health.lanes_changed("nann", 1, proven=0, lanes=2)
    health.lanes_changed("nann", 2, proven=1, lanes=2)
    assert (health.ready, health.doubted) == (False, [("nann", 1), ("nann", 2)])
    health.lanes_changed("nann", 1, proven=0, lanes=0)
    assert (health.ready, health.doubted) == (True, [("nann", 2)])


def test_an_impairment_while_loading_or_draining_does_not_hide_the_life() -> None:
    health = Health()
    seen: list[bool] = []
    health.subscribe(seen.append)
    health.lanes_changed("a", 1, proven=0, lanes=1)
    assert health.state is HealthState.LOADING
    health.draining()
    assert health.state is HealthState.DRAINING
    assert seen == [False, False]  # told of draining, though it was not ready before either


class Recovery:
    """`keep_recovering` over a model of four lanes, with a clock that only its sleeps move."""

    def __init__(self, **options: float) -> None:
        self.now_s = 0.0
        self.health = Health(clock=lambda: self.now_s)
        self.health.loaded()
        self.delays: list[float] = []
        self.outcomes: list[int | Exception] = []  # of each probe: lanes proven after it, or its error
        self.asleep = asyncio.Event()
        self.task = asyncio.create_task(keep_recovering(self.health, self.probe, sleep=self.sleep, **options))

    def lanes(self, proven: int) -> None:
        self.health.lanes_changed("nann", 1, proven=proven, lanes=4)

    async def probe(self, model: str, version: int) -> None:
        assert (model, version) == ("nann", 1)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        self.lanes(outcome)

    async def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        if not self.outcomes:
            self.asleep.set()
            await asyncio.Event().wait()
        self.now_s += seconds

    async def until(self, state: bool) -> None:
        done = asyncio.Event()
        self.health.subscribe(lambda ready: done.set() if ready is state else None)
        await asyncio.wait_for(done.wait(), 10)

    async def end(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_recovery_tries_at_once_then_ever_more_slowly_until_a_search_succeeds() -> None:
    recovery = Recovery()
    await asyncio.sleep(0)
    assert recovery.delays == []  # nothing to do while all is well
    recovery.outcomes = [BackendError("lost")] * 7 + [4]
    recovery.lanes(0)
    await recovery.until(True)
    assert recovery.delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    recovery.outcomes = [4]
    recovery.lanes(0)
    await recovery.until(True)
    assert recovery.delays[8:] == [0.0]
    await recovery.end()


async def test_lanes_in_doubt_are_tried_while_the_model_is_ready() -> None:
    recovery = Recovery()
    recovery.outcomes = [BackendError("lost"), 4]
    recovery.lanes(2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (recovery.delays, recovery.health.ready) == ([0.0, 1.0], True)
    assert not recovery.health.doubted
    await recovery.end()


async def test_another_failure_is_looked_into_at_once() -> None:
    recovery = Recovery()
    recovery.outcomes = [BackendError("lost")] * 3
    recovery.lanes(2)  # a device of two is lost for good
    await asyncio.wait_for(recovery.asleep.wait(), 10)
    assert recovery.delays == [0.0, 1.0, 2.0, 4.0]
    recovery.outcomes = [2]
    recovery.lanes(0)  # then the other one fails once
    await recovery.until(True)
    assert recovery.now_s == 3.0  # without the rest of the 4 s
    for _ in range(20):
        await asyncio.sleep(0)
    assert recovery.delays[4:] == [1.0]  # patience begins anew
    await recovery.end()


async def test_it_gives_up_on_a_model_that_stays_impaired() -> None:
    recovery = Recovery(give_up_after_s=20.0)
    recovery.outcomes = [BackendError("lost")] * 10
    recovery.lanes(0)
    with pytest.raises(BackendError, match="no search of nann has succeeded for 31 s"):
        await asyncio.wait_for(recovery.task, 10)
    assert recovery.delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]


async def test_one_device_of_several_may_be_lost_for_ever() -> None:
    recovery = Recovery(give_up_after_s=20.0)
    recovery.outcomes = [BackendError("lost")] * 10
    recovery.lanes(2)
    await asyncio.wait_for(recovery.asleep.wait(), 10)
    assert recovery.now_s > 100
    assert not recovery.task.done()
    await recovery.end()
