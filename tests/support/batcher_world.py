"""A batcher whose lanes and clock a test holds in its hands, and what it told about itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fake_engine import PATIENCE_S, FakeQuery, GatedSearch, ManualTime

from nann.service.batcher import Answer, Batcher, BatcherLimits, BatchObserver


class Recorder(BatchObserver):
    def __init__(self) -> None:
        self.depth = 0
        self.busy = 0
        self.waits_s: list[float] = []
        self.batches: list[tuple[int, str]] = []
        self.searches_s: list[float] = []
        self.rejections: list[str] = []

    def queue_changed(self, delta: int) -> None:
        self.depth += delta

    def lanes_changed(self, delta: int) -> None:
        self.busy += delta

    def waited(self, queue_wait_s: float) -> None:
        self.waits_s.append(queue_wait_s)

    def dispatched(self, size: int, reason: str) -> None:
        self.batches.append((size, reason))

    def searched(self, search_s: float) -> None:
        self.searches_s.append(search_s)

    def rejected(self, reason: str) -> None:
        self.rejections.append(reason)


class World:
    """A batcher whose lanes and clock the test holds in its hands."""

    def __init__(self, **limits: Any) -> None:
        self.time = ManualTime()
        self.search = GatedSearch()
        self.observer = Recorder()
        self.proven: list[int] = []
        sizes = {"n_lanes": 1, "max_batch": 4, "queue_limit": 8, "queue_work_limit": 1000}
        sizes |= {"batch_work_limit": 10_000, **limits}
        self.batcher: Batcher[FakeQuery, str] = Batcher(
            self.search,
            BatcherLimits(**sizes),
            observer=self.observer,
            on_lanes=self.proven.append,
            clock=self.time.clock,
            call_later=self.time.call_later,
        )

    def submit(
        self, name: str, *, deadline_s: float | None = None, **query: Any
    ) -> asyncio.Task[Answer[str]]:
        call: Coroutine[Any, Any, Answer[str]] = self.batcher.submit(
            FakeQuery(name, **query), deadline_s=deadline_s
        )
        return asyncio.create_task(asyncio.wait_for(call, PATIENCE_S))

    def submit_many(
        self, *names: str, deadline_s: float | None = None, **query: Any
    ) -> asyncio.Task[list[Answer[str] | Exception]]:
        call = self.batcher.submit_many([FakeQuery(name, **query) for name in names], deadline_s=deadline_s)
        return asyncio.create_task(asyncio.wait_for(call, PATIENCE_S))

    async def occupy_lane(self) -> Any:
        """Fill one lane with a batch of one; returns its held call."""
        self.submit("occupant")
        return await self.search.next_call()


def names(call: Any) -> list[str]:
    return [query.name for query in call.batch]
