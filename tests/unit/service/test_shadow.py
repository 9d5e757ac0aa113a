from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import PATIENCE_S, FakeEngine, FakePrepared, settle
from typing_extensions import override

from nann.engine.errors import BackendError
from nann.engine.types import Hits, SearchParams
from nann.service.health import Health
from nann.service.metrics import Metrics
from nann.service.registry import Registry
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.shadow import ShadowSampler
from nann.service.types import ParamOverrides, RetrieveReply, RetrieveRequest
from nann.service.user_store import MemoryUserStore

EXHAUSTIVE = SearchParams(policy="exhaustive")


class ShadowEngine(FakeEngine):
    """Walks find all but the best item; exhaustive searches find it, and wait at a gate of their own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(version=3, **settings)
        self.exhaustive_gate = threading.Event()
        self.exhaustive_gate.set()
        self.exhaustive_error: Exception | None = None

    @override
    def search(
        self, batch: Sequence[FakePrepared], lane: int, probe: Callable[[str], None] | None = None
    ) -> list[Hits]:
        found = super().search(batch, lane, probe)
        if batch[0].query.params != EXHAUSTIVE:
            return [Hits(hits.item_ids, [score - 1 for score in hits.scores], 100, 3) for hits in found]
        assert self.exhaustive_gate.wait(PATIENCE_S)
        if self.exhaustive_error is not None:
            raise self.exhaustive_error
        return found


class World:
    def __init__(self, directory: Path, engine: ShadowEngine, **settings: Any) -> None:
        (directory / "nann" / "3").mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.metrics = Metrics()
        self.settings = Settings(repository=directory, **{"shadow_exact_every": 1, **settings})
        self.registry = Registry(self.settings, self.metrics, lambda _path: engine)  # type: ignore[arg-type,return-value]
        self.service = RetrievalService(
            self.registry,
            MemoryUserStore(history_limit=10),
            self.settings,
            health=Health(),
            metrics=self.metrics,
        )

    async def retrieve(self, **request: Any) -> RetrieveReply:
        return await self.service.retrieve(RetrieveRequest(user_id=1, k=4, **request))

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for family in self.metrics.registry.collect()
            if family.name == "nann_shadow_samples"
            for sample in family.samples
        }

    async def until(self, **outcomes: float) -> None:
        await _until(lambda: self.outcomes() == outcomes)
        assert self.outcomes() == outcomes

    async def until_searched(self, batches: int) -> None:
        await _until(lambda: len(self.engine.batches) >= batches)
        assert len(self.engine.batches) == batches


async def _until(reached: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not reached() and time.monotonic() < give_up_s:  # noqa: ASYNC110  # counters tell nobody
        await asyncio.sleep(0.001)


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[World] = []

    async def make(engine: ShadowEngine | None = None, **settings: Any) -> World:
        world = World(tmp_path, engine or ShadowEngine(), **settings)
        made.append(world)
        await world.registry.load()
        return world

    yield make
    for world in made:
        world.engine.gate.set()
        world.engine.exhaustive_gate.set()
        await world.registry.close()


async def test_a_sampled_answer_is_compared_with_the_exhaustive_one(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve(profile="fast")
    await world.until(measured=1)
    # Scores -1 … -4 against 0 … -3: the last of the four is missing.
    labels = {"model": "nann", "profile": "fast"}
    assert world.value("nann_shadow_recall_count", **labels) == 1
    assert world.value("nann_shadow_recall_sum", **labels) == 0.75
    walk, exact = (batch[0].query for batch in world.engine.batches)
    assert exact.params == EXHAUSTIVE
    assert (exact.k, exact.history, exact.seen) == (walk.k, walk.history, walk.seen)


async def test_queries_of_a_batch_call_are_sampled_too(worlds: Any) -> None:
    world = await worlds()
    await world.service.retrieve_many([RetrieveRequest(user_id=1, k=4), RetrieveRequest(user_id=2, k=4)])
    await world.until(measured=1, in_flight=1)


async def test_parameters_of_no_profile_are_called_other(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve(params=ParamOverrides(ef=77))
    await world.until(measured=1)
    assert world.value("nann_shadow_recall_count", model="nann", profile="other") == 1


async def test_it_is_off_by_default(worlds: Any) -> None:
    assert Settings(repository=Path()).shadow_exact_every == 0
    world = await worlds(shadow_exact_every=0)
    await world.retrieve()
    await settle()
    assert (world.outcomes(), len(world.engine.batches)) == ({}, 1)


async def test_an_exhaustive_answer_is_not_searched_again(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve(profile="exact")
    await settle()
    assert (world.outcomes(), len(world.engine.batches)) == ({}, 1)


async def test_one_in_n_is_sampled(worlds: Any, tmp_path: Path) -> None:
    world = await worlds(shadow_exact_every=0)
    drawn = iter([0.0, 0.24, 0.25, 0.9])
    sampler = ShadowSampler(
        Settings(repository=tmp_path, shadow_exact_every=4), world.metrics, draw=drawn.__next__
    )
    reply = await world.retrieve()
    ((walked,),) = world.engine.batches
    with world.registry.served().lease() as served:
        for _ in range(4):
            sampler.consider(served, walked.query, walked, reply.hits)
    await world.until(in_flight=1, measured=1)  # two of four; the second came while the first was in flight
    assert not list(drawn)


async def test_only_one_is_in_flight_and_nobody_waits_for_it(worlds: Any) -> None:
    world = await worlds()
    world.engine.exhaustive_gate.clear()
    await world.retrieve()
    await world.until_searched(2)
    for _ in range(3):
        await world.retrieve()  # answered on the other lane while the exhaustive search is held
    await world.until(in_flight=3)
    world.engine.exhaustive_gate.set()
    await world.until(in_flight=3, measured=1)


async def test_it_takes_no_lane_that_somebody_may_need(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve()
    await world.until(measured=1)
    world.engine.gate.clear()
    with world.registry.served().lease() as served:
        exact = world.engine.batches[-1][0]
        waiting = asyncio.create_task(world.retrieve(profile="exact"))
        await _until(lambda: served.batcher.lanes_busy == 1)
        assert await served.batcher.search_if_idle(exact) is None  # one lane of two is free
    world.engine.gate.set()
    await waiting


async def test_a_single_lane_is_used_when_it_is_free(worlds: Any) -> None:
    world = await worlds(ShadowEngine(lanes=1))
    await world.retrieve()
    await world.until(measured=1)


async def test_a_corpus_that_is_too_large_is_skipped(worlds: Any) -> None:
    world = await worlds(shadow_exact_max_items=99)  # FakePrepared costs 100
    await world.retrieve()
    await world.until(too_large=1)
    assert len(world.engine.batches) == 1


async def test_the_bound_is_that_of_a_batch_by_default(worlds: Any) -> None:
    world = await worlds(max_batch_work=99)
    await world.retrieve()
    await world.until(too_large=1)


async def test_its_time_is_nobodys_wait_and_no_search_time(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve()
    await world.until(measured=1)
    assert world.value("nann_batches_total", reason="shadow") == 1
    assert world.value("nann_batches_total", reason="lane_free") == 1
    for name, labels in [
        ("nann_queue_wait_seconds_count", {}),
        ("nann_search_duration_seconds_count", {"model": "nann"}),
        ("nann_items_scored_count", {}),
    ]:
        assert world.value(name, **labels) == 1


@pytest.mark.parametrize("error", [BackendError("lost"), RuntimeError("a bug of ours")])
async def test_a_failure_is_counted_and_the_next_one_is_tried(worlds: Any, error: Exception) -> None:
    world = await worlds(ShadowEngine(lanes=1))
    world.engine.exhaustive_error = error
    await world.retrieve()
    await world.until(failed=1)
    world.engine.exhaustive_error = None
    await world.retrieve()  # proves the lane again
    await world.until(failed=1, measured=1)


async def test_the_version_stays_until_it_is_measured(worlds: Any) -> None:
    world = await worlds()
    world.engine.exhaustive_gate.clear()
    await world.retrieve()
    await world.until_searched(2)
    closing = asyncio.create_task(world.registry.close())
    await settle()
    assert not world.engine.closed
    world.engine.exhaustive_gate.set()
    await closing
    assert world.engine.closed
