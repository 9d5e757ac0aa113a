from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nann.engine.errors import Overloaded
from nann.offline.benchmark.gpu.loads import GroupTarget, Served, capacity, rate
from nann.offline.benchmark.gpu.measure import K
from nann.offline.benchmark.gpu.quality import Ranked

EXACT = Ranked(np.tile(np.arange(K, dtype=np.int64), (6, 1)), np.zeros((6, K), np.float32))


class Engine:
    """Answers at once: the first `right` items of the exact answer."""

    def __init__(self, right: int = K, refuse_after: int = 10**9) -> None:
        self.asked: list[list[int]] = []
        self.right = right
        self.refuse_after = refuse_after

    async def __call__(self, users: Sequence[int]) -> list[Any]:
        self.asked.append(list(users))
        await asyncio.sleep(0)
        if len(self.asked) > self.refuse_after:
            raise Overloaded("full")
        found = SimpleNamespace(
            item_ids=list(range(self.right)) + list(range(1000, 1000 + K - self.right)),
            scores=[0.0] * self.right + [-1.0] * (K - self.right),
            n_scored=500,
        )
        return [found for _ in users]


def served(engine: Any) -> Served:
    async def single(users: Sequence[int]) -> list[Any]:
        raise AssertionError("groups go the other way")

    return Served(single, engine, lambda: len(getattr(engine, "asked", [])), lambda: 0)


async def test_a_group_is_users_in_turn() -> None:
    engine = Engine()
    target = GroupTarget(served(engine), users=6, group=4)
    assert (await target.send(0)).n_scored == 500
    await target.send(1)
    assert engine.asked == [[0, 1, 2, 3], [4, 5, 0, 1]]


async def test_recall_is_of_the_users_that_were_answered() -> None:
    target = GroupTarget(served(Engine(right=150)), users=6, group=2)
    assert target.recall(EXACT) is None
    await target.send(0)
    assert target.recall(EXACT) == 0.75


async def test_capacity_counts_queries_not_groups() -> None:
    engine = Engine()
    figures = await capacity(GroupTarget(served(engine), users=6, group=4), EXACT, in_flight=2, seconds=0.05)
    assert figures.loop == "closed" and figures.offered_qps is None
    assert figures.queries % 4 == 0 and 0 < figures.queries <= 4 * len(engine.asked)
    assert figures.pairs_per_s == pytest.approx(500 * figures.qps)
    assert figures.recall == 1 and figures.failures == 0
    assert figures.mean_batch == 4 and figures.launches_a_search == 0


async def test_single_queries_go_their_own_way_and_searches_are_counted() -> None:
    engine, searches, launches = Engine(), 0, 0

    async def one(users: Sequence[int]) -> list[Any]:
        nonlocal searches, launches
        searches, launches = searches + 1, launches + 30
        return await engine(users)

    both = Served(one, engine, lambda: searches, lambda: launches)
    target = GroupTarget(both, users=6, group=1, single=True)
    figures = await capacity(target, EXACT, in_flight=1, seconds=0.02)
    assert searches == len(engine.asked)
    assert figures.mean_batch == 1 and figures.launches_a_search == 30


async def test_an_open_loop_sends_what_it_was_told_and_counts_failures() -> None:
    engine = Engine(refuse_after=10)
    target = GroupTarget(served(engine), users=6, group=2)
    figures = await rate(target, EXACT, qps=400, seconds=0.2)
    assert figures.offered_qps == 400
    assert 20 <= 2 * len(engine.asked) <= 160  # 80 on average, at random
    assert figures.failures > 0 and figures.failures % 2 == 0
    assert figures.p50_ms <= figures.p95_ms <= figures.p99_ms


async def test_a_slow_rate_waits_for_a_few_groups() -> None:
    engine = Engine()
    figures = await rate(GroupTarget(served(engine), users=6, group=2), EXACT, qps=200, seconds=0.01)
    assert figures.queries == 2 * 4


async def test_where_a_search_outlasts_the_load_one_round_is_measured() -> None:
    release = asyncio.Event()

    async def slow(users: Sequence[int]) -> list[Any]:
        asyncio.get_running_loop().call_later(0.03, release.set)
        await release.wait()
        return await Engine()(users)

    figures = await capacity(GroupTarget(served(slow), users=6, group=2), EXACT, in_flight=2, seconds=0.001)
    assert figures.queries >= 4 and figures.qps > 0
