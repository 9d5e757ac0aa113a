from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from fake_engine import PATIENCE_S, FakeQuery, GatedSearch, ManualTime, settle

from nann.engine.errors import BackendError, DeadlineExceeded, NotReady, Overloaded
from nann.service.batcher import Answer, Batcher, BatcherLimits, BatchObserver
from nann.service.errors import InternalError


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
        sizes = {"n_lanes": 1, "max_batch": 4, "queue_limit": 8, "queue_work_limit": 1000, **limits}
        self.batcher: Batcher[FakeQuery, str] = Batcher(
            self.search,
            BatcherLimits(**sizes),
            observer=self.observer,
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

    async def occupy_lane(self) -> Any:
        """Fill one lane with a batch of one; returns its held call."""
        self.submit("occupant")
        return await self.search.next_call()


def names(call: Any) -> list[str]:
    return [query.name for query in call.batch]


async def test_a_free_lane_takes_what_is_there_at_once() -> None:
    world = World()
    tasks = [world.submit("a"), world.submit("b")]
    call = await world.search.next_call()
    assert names(call) == ["a", "b"]
    assert world.time.timers == []
    call.finish()
    assert [(await task).result for task in tasks] == ["hits of a", "hits of b"]
    assert world.observer.batches == [(2, "lane_free")]


async def test_what_arrives_while_the_lanes_are_busy_shares_the_next_batch() -> None:
    world = World()
    first = await world.occupy_lane()
    tasks = [world.submit(name) for name in "abcde"]
    await settle()
    assert world.batcher.depth == 5
    first.finish()
    second = await world.search.next_call()
    assert names(second) == ["a", "b", "c", "d"]
    second.finish()
    third = await world.search.next_call()
    assert names(third) == ["e"]
    third.finish()
    assert [(await task).batch_size for task in tasks] == [4, 4, 4, 4, 1]
    assert world.observer.batches == [(1, "lane_free"), (4, "full"), (1, "lane_free")]


async def test_lanes_work_side_by_side_and_never_twice_at_a_time() -> None:
    world = World(n_lanes=2)
    one = await world.occupy_lane()
    two = await world.occupy_lane()
    assert {one.lane, two.lane} == {0, 1}
    waiting = world.submit("waiting")
    await settle()
    assert (world.batcher.lanes_busy, world.batcher.depth) == (2, 1)
    two.finish()
    three = await world.search.next_call()
    assert three.lane == two.lane
    one.finish()
    three.finish()
    await waiting


async def test_only_equal_compat_shares_a_batch_and_the_oldest_group_goes_first() -> None:
    world = World()
    first = await world.occupy_lane()
    tasks = []
    for name, compat in [("a1", "A"), ("b1", "B"), ("a2", "A"), ("c1", "C"), ("b2", "B")]:
        tasks.append(world.submit(name, compat=compat))
        await settle()
        world.time.advance(0.001)
    first.finish()
    order = []
    for _ in range(3):
        call = await world.search.next_call()
        order.append(names(call))
        call.finish()
    assert order == [["a1", "a2"], ["b1", "b2"], ["c1"]]
    await asyncio.gather(*tasks)


async def test_a_busy_group_does_not_starve_an_older_query_of_another() -> None:
    world = World(max_batch=2)
    first = await world.occupy_lane()
    tasks = [world.submit("rare", compat="B")]
    await settle()
    world.time.advance(0.001)
    tasks += [world.submit(f"usual{n}") for n in range(4)]
    await settle()
    first.finish()
    call = await world.search.next_call()
    assert names(call) == ["rare"]
    call.finish()
    for _ in range(2):
        (await world.search.next_call()).finish()
    await asyncio.gather(*tasks)


async def test_a_full_queue_refuses_at_once() -> None:
    world = World(queue_limit=2)
    first = await world.occupy_lane()
    waiting = [world.submit("a"), world.submit("b")]
    await settle()
    with pytest.raises(Overloaded) as refused:
        await world.batcher.submit(FakeQuery("c"))
    assert refused.value.retry_after_s == 1.0  # nothing measured yet
    assert world.observer.rejections == ["queue_full"]
    first.finish()
    call = await world.search.next_call()
    assert names(call) == ["a", "b"]
    call.finish()
    await asyncio.gather(*waiting)


async def test_retry_after_is_the_waiting_work_at_the_measured_rate() -> None:
    world = World(queue_limit=2, n_lanes=1)
    first = await world.occupy_lane()  # cost 10
    world.time.advance(0.5)
    first.finish()  # so 0.05 s a unit of cost
    await settle()
    second = await world.occupy_lane()
    waiting = [world.submit("a", cost=30), world.submit("b", cost=50)]
    await settle()
    with pytest.raises(Overloaded) as refused:
        await world.batcher.submit(FakeQuery("c"))
    assert refused.value.retry_after_s == pytest.approx(80 * 0.05)
    second.finish()
    (await world.search.next_call()).finish()
    await asyncio.gather(*waiting)


async def test_the_queue_is_bounded_by_work_too() -> None:
    world = World(queue_work_limit=100)
    first = await world.occupy_lane()
    waiting = [world.submit("a", cost=90)]
    await settle()
    with pytest.raises(Overloaded, match="90 items"):
        await world.batcher.submit(FakeQuery("b", cost=11))
    waiting.append(world.submit("c", cost=10))
    await settle()
    assert world.observer.rejections == ["work_full"]
    first.finish()
    call = await world.search.next_call()
    assert names(call) == ["a", "c"]
    call.finish()
    await asyncio.gather(*waiting)


async def test_a_query_dearer_than_the_whole_bound_is_let_in_alone() -> None:
    world = World(queue_work_limit=100)
    first = await world.occupy_lane()
    dear = world.submit("dear", cost=5000)
    await settle()
    assert world.batcher.depth == 1
    first.finish()
    (await world.search.next_call()).finish()
    await dear


async def test_an_expired_query_is_told_at_its_deadline_and_never_reaches_the_engine() -> None:
    world = World()
    first = await world.occupy_lane()
    late = world.submit("late", deadline_s=world.time.now_s + 0.010)
    patient = world.submit("patient", deadline_s=world.time.now_s + 5.0)
    await settle()
    world.time.advance(0.011)
    with pytest.raises(DeadlineExceeded, match="in the queue"):
        await late
    assert world.batcher.depth == 1
    first.finish()
    call = await world.search.next_call()
    assert names(call) == ["patient"]
    call.finish()
    await patient
    assert world.observer.rejections == ["expired"]
    assert world.time.timers == []


async def test_a_deadline_whose_timer_is_late_is_still_seen_at_dispatch() -> None:
    world = World()
    first = await world.occupy_lane()
    late = world.submit("late", deadline_s=world.time.now_s + 0.010)
    await settle()
    world.time.now_s += 1.0  # a blocked loop: time passed, no timer has run
    first.finish()
    with pytest.raises(DeadlineExceeded):
        await late
    assert world.observer.batches == [(1, "lane_free")]


async def test_a_deadline_on_the_lane_frees_the_caller_and_not_the_lane() -> None:
    world = World()
    task = world.submit("slow", deadline_s=world.time.now_s + 0.010)
    mate = world.submit("mate")
    call = await world.search.next_call()
    world.time.advance(0.010)
    with pytest.raises(DeadlineExceeded, match="searched"):
        await task
    assert world.batcher.lanes_busy == 1
    call.finish()
    assert (await mate).result == "hits of mate"


async def test_a_deadline_already_passed_is_refused_on_arrival() -> None:
    world = World()
    with pytest.raises(DeadlineExceeded):
        await world.batcher.submit(FakeQuery("a"), deadline_s=world.time.now_s)
    assert (world.batcher.depth, world.observer.rejections) == (0, ["expired"])


async def test_an_abandoned_query_never_reaches_the_engine() -> None:
    world = World()
    first = await world.occupy_lane()
    abandoned, kept = world.submit("abandoned"), world.submit("kept")
    await settle()
    abandoned.cancel()
    await settle()
    assert world.batcher.depth == 1
    first.finish()
    call = await world.search.next_call()
    assert names(call) == ["kept"]
    call.finish()
    await kept


async def test_a_query_abandoned_on_the_lane_harms_nobody() -> None:
    world = World()
    abandoned, kept = world.submit("abandoned"), world.submit("kept")
    call = await world.search.next_call()
    abandoned.cancel()
    await settle()
    call.finish()
    assert (await kept).result == "hits of kept"


async def test_an_engine_error_fails_its_batch_only_with_a_fresh_exception_a_waiter() -> None:
    world = World(n_lanes=2)
    failing = [world.submit("a", compat="A"), world.submit("b", compat="A")]
    bad = await world.search.next_call()
    fine = world.submit("c", compat="B")
    good = await world.search.next_call()
    cause = BackendError("device lost")
    bad.finish(error=cause)
    errors = await asyncio.gather(*failing, return_exceptions=True)
    assert [type(error) for error in errors] == [BackendError, BackendError]
    assert [str(error) for error in errors] == ["device lost", "device lost"]
    assert errors[0] is not errors[1]
    assert all(error is not cause and error.__cause__ is cause for error in errors)
    good.finish()
    assert (await fine).result == "hits of c"
    again = world.submit("again")
    (await world.search.next_call()).finish()
    assert (await again).result == "hits of again"


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3)])
async def test_any_other_failure_is_a_bug_of_ours_and_hangs_nobody(error: BaseException) -> None:
    world = World()
    task = world.submit("a")
    (await world.search.next_call()).finish(error=error)
    with pytest.raises(InternalError) as caught:
        await task
    assert caught.value.__cause__ is error
    assert world.batcher.lanes_busy == 0


@pytest.mark.parametrize("results", [[], ["one"], ["one", "two", "three"]])
async def test_the_number_of_results_is_checked(results: list[str]) -> None:
    world = World()
    tasks = [world.submit("a"), world.submit("b")]
    (await world.search.next_call()).finish(results=results)
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, InternalError)
        assert f"{len(results)} results for 2 queries" in str(error)


async def test_the_fill_timer_counts_from_the_oldest_arrival() -> None:
    world = World(batch_wait_s=0.010)
    tasks = [world.submit("a")]
    await settle()
    world.time.advance(0.006)
    tasks.append(world.submit("b"))
    await settle()
    assert (world.batcher.depth, world.batcher.lanes_busy) == (2, 0)
    world.time.advance(0.004)
    call = await world.search.next_call()
    assert names(call) == ["a", "b"]
    call.finish()
    await asyncio.gather(*tasks)
    assert world.observer.batches == [(2, "fill_timer")]
    assert world.time.timers == []


async def test_a_full_batch_does_not_wait_for_the_fill_timer() -> None:
    world = World(batch_wait_s=10.0)
    lonely = world.submit("lonely", compat="B")
    await settle()
    tasks = [world.submit(name) for name in "abcd"]
    call = await world.search.next_call()
    assert names(call) == ["a", "b", "c", "d"]
    call.finish()
    await asyncio.gather(*tasks)
    assert world.observer.batches == [(4, "full")]
    lonely.cancel()


async def test_the_answer_says_where_the_time_went() -> None:
    world = World()
    first = await world.occupy_lane()
    task = world.submit("a")
    await settle()
    world.time.advance(0.030)
    first.finish()
    call = await world.search.next_call()
    world.time.advance(0.002)
    call.finish()
    answer = await task
    assert (answer.queue_s, answer.search_s) == (pytest.approx(0.030), pytest.approx(0.002))
    assert world.observer.waits_s == [0.0, pytest.approx(0.030)]
    assert world.observer.searches_s == [pytest.approx(0.030), pytest.approx(0.002)]
    assert (world.observer.depth, world.observer.busy) == (0, 0)


async def test_close_refuses_the_new_and_finishes_the_accepted() -> None:
    world = World(batch_wait_s=60.0, max_batch=1)
    first = await world.occupy_lane()
    waiting = [world.submit("a"), world.submit("b", compat="B")]
    await settle()
    closing = asyncio.create_task(asyncio.wait_for(world.batcher.close(), PATIENCE_S))
    await settle()
    with pytest.raises(NotReady):
        await world.batcher.submit(FakeQuery("too late"))
    for call in [first, None, None]:
        assert not closing.done()
        (call or await world.search.next_call()).finish()
    assert [(await task).result for task in waiting] == ["hits of a", "hits of b"]
    await closing


async def test_close_does_not_wait_for_a_fill_timer() -> None:
    world = World(batch_wait_s=60.0)
    task = world.submit("a")
    await settle()
    closing = asyncio.create_task(asyncio.wait_for(world.batcher.close(), PATIENCE_S))
    (await world.search.next_call()).finish()
    await closing
    await task
    assert world.observer.batches == [(1, "closing")]


async def test_close_of_an_idle_batcher_returns_and_ends_its_threads() -> None:
    world = World(n_lanes=3)
    await world.batcher.close()
    for lane in world.batcher._lanes:
        lane._thread.join(10)
        assert not lane._thread.is_alive()


async def test_thousands_of_queries_with_cancellations_leave_nothing_behind() -> None:
    world = World(n_lanes=2, queue_limit=10_000, queue_work_limit=10**9)
    tasks = [world.submit(f"q{n}", compat=n % 3) for n in range(1000)]
    await settle()
    for task in tasks[::5]:
        task.cancel()

    async def run_lanes() -> None:
        while True:
            (await world.search.next_call()).finish()

    runner = asyncio.create_task(run_lanes())
    results = await asyncio.gather(*tasks, return_exceptions=True)
    runner.cancel()
    answered = [result for result in results if isinstance(result, Answer)]
    cancelled = [result for result in results if isinstance(result, asyncio.CancelledError)]
    assert len(answered) + len(cancelled) == 1000
    assert len(cancelled) == 200
    for n, result in enumerate(results):
        assert isinstance(result, asyncio.CancelledError) or result.result == f"hits of q{n}"
    assert (world.batcher.depth, world.batcher._work, world.batcher._groups) == (0, 0, {})
