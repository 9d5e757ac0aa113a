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
    health.search_succeeded("nann")
    assert health.state is HealthState.DRAINING
    assert seen == [False, True, False]


def test_each_impaired_model_needs_a_search_of_its_own() -> None:
    health = Health()
    health.loaded()
    health.search_failed("a")
    health.search_failed("b")
    assert (health.state, health.impaired_models) == (HealthState.IMPAIRED, {"a", "b"})
    health.search_succeeded("a")
    health.search_succeeded("c")
    assert not health.ready
    health.search_succeeded("b")
    assert health.ready


def test_an_impairment_while_loading_or_draining_does_not_hide_the_life() -> None:
    health = Health()
    seen: list[bool] = []
    health.subscribe(seen.append)
    health.search_failed("a")
    assert health.state is HealthState.LOADING
    health.draining()
    assert health.state is HealthState.DRAINING
    assert seen == [False, False]  # told of draining, though it was not ready before either


async def test_recovery_tries_at_once_then_ever_more_slowly_until_a_search_succeeds() -> None:
    health = Health()
    health.loaded()
    outcomes = [BackendError("lost")] * 7 + [None]
    delays: list[float] = []
    recovered = asyncio.Event()

    async def probe(model: str) -> None:
        assert model == "nann"
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        health.search_succeeded(model)
        recovered.set()

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    task = asyncio.create_task(keep_recovering(health, probe, sleep=sleep))
    await asyncio.sleep(0)
    assert delays == []  # nothing to do while all is well
    health.search_failed("nann")
    await asyncio.wait_for(recovered.wait(), 10)
    assert health.ready
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]

    outcomes[:] = [None]
    recovered.clear()
    health.search_failed("nann")
    await asyncio.wait_for(recovered.wait(), 10)
    assert delays[-1] == 0.0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
