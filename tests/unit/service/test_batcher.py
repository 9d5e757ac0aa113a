from __future__ import annotations

import asyncio
import time

import pytest
from batcher_world import World, names
from fake_engine import PATIENCE_S, FakeQuery, settle

from nann.engine.errors import BackendError, DeadlineExceeded, NotReady, Overloaded
from nann.service.batcher import Answer
from nann.service.errors import InternalError


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


async def test_lanes_of_a_failed_device_get_no_traffic_until_a_probe_succeeds_on_them() -> None:
    world = World(n_lanes=4, lane_groups=("a", "a", "b", "b"))
    tasks, by_lane = {}, {}
    for _ in range(4):
        task = world.submit("occupant")
        call = await world.search.next_call()
        tasks[call.lane], by_lane[call.lane] = task, call
    for lane in (0, 1):
        by_lane[lane].finish(error=BackendError("lost"))
        with pytest.raises(BackendError):
            await tasks[lane]
    for lane in (2, 3):
        by_lane[lane].finish()
        await tasks[lane]
    assert world.proven == [2]  # told once: lane 0 took lane 1 with it
    answers = [world.submit(name, compat=name) for name in "cd"]
    calls = [await world.search.next_call() for _ in answers]
    assert {call.lane for call in calls} == {2, 3}
    waiting = world.submit("waiting")
    await settle()
    assert (world.batcher.depth, world.batcher.lanes_busy) == (1, 2)  # lanes 0 and 1 stand idle

    probing = asyncio.create_task(world.batcher.probe(FakeQuery("probe"), deadline_s=world.time.now_s + 9))
    probes = {call.lane: call for call in [await world.search.next_call() for _ in range(2)]}
    assert set(probes) == {0, 1}
    probes[1].finish()
    call = await world.search.next_call()
    assert (call.lane, names(call)) == (1, ["waiting"])
    probes[0].finish(error=BackendError("still lost"))
    with pytest.raises(BackendError, match="still lost"):
        await probing
    assert world.proven == [2, 3]
    for held in (*calls, call):
        held.finish()
    await asyncio.gather(waiting, *answers)
    assert world.observer.batches[-3:] == [(1, "probe"), (1, "probe"), (1, "lane_free")]


async def test_a_probe_of_a_lane_that_hangs_ends_at_its_deadline() -> None:
    world = World()
    task = world.submit("lost")
    (await world.search.next_call()).finish(error=BackendError("lost"))
    with pytest.raises(BackendError):
        await task
    probing = asyncio.create_task(world.batcher.probe(FakeQuery("probe"), deadline_s=world.time.now_s + 9))
    call = await world.search.next_call()
    world.time.advance(9)
    with pytest.raises(DeadlineExceeded):
        await probing
    assert world.proven == [0]
    await world.batcher.probe(FakeQuery("probe"), deadline_s=world.time.now_s + 9)  # no lane in doubt is free
    call.finish()
    await world.batcher.close()
    assert world.proven == [0, 1]


async def test_a_probe_touches_no_lane_that_is_proven() -> None:
    world = World()
    await world.batcher.probe(FakeQuery("probe"), deadline_s=world.time.now_s + 9)
    assert world.observer.batches == []


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
    for (lane,) in world.batcher._threads:
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
    assert (world.batcher.depth, world.batcher._queue.work, list(world.batcher._queue.groups())) == (0, 0, [])


# Batches by work, and calls of many


async def test_a_batch_ends_where_its_work_would_pass_the_limit() -> None:
    world = World(batch_work_limit=100)
    first = await world.occupy_lane()
    tasks = [world.submit(name, cost=cost) for name, cost in [("a", 60), ("b", 40), ("c", 30), ("d", 500)]]
    await settle()
    first.finish()
    order = []
    for _ in range(3):
        call = await world.search.next_call()
        order.append(names(call))
        call.finish()
    assert order == [["a", "b"], ["c"], ["d"]]
    assert [reason for _, reason in world.observer.batches[1:]] == ["full", "full", "full"]
    await asyncio.gather(*tasks)


async def test_a_call_of_many_has_one_outcome_a_query_in_order() -> None:
    world = World(max_batch=2)
    call = world.submit_many("a", "b", "c")
    for _ in range(2):
        (await world.search.next_call()).finish()
    outcomes = await call
    assert [outcome.result for outcome in outcomes] == ["hits of a", "hits of b", "hits of c"]
    assert [outcome.batch_size for outcome in outcomes] == [2, 2, 1]
    assert await world.batcher.submit_many([]) == []


async def test_a_failed_batch_fails_only_its_queries_of_a_call() -> None:
    world = World(max_batch=2)
    call = world.submit_many("a", "b", "c")
    (await world.search.next_call()).finish(error=BackendError("device lost"))
    (await world.search.next_call()).finish()
    a, b, c = await call
    assert [type(outcome) for outcome in (a, b)] == [BackendError, BackendError]
    assert a is not b
    assert c.result == "hits of c"


async def test_a_call_of_many_is_let_in_whole_or_not_at_all() -> None:
    world = World(queue_limit=8, queue_work_limit=1000)
    first = await world.occupy_lane()
    some = world.submit_many("a", "b", "c")
    await settle()
    with pytest.raises(Overloaded, match="3 queries from batch calls"):
        await world.batcher.submit_many([FakeQuery("d"), FakeQuery("e")])
    assert world.batcher.depth == 3
    assert world.observer.rejections == ["queue_full", "queue_full"]
    alone = world.submit("alone")  # the other half of the queue is not theirs
    first.finish()
    for _ in range(2):
        (await world.search.next_call()).finish()
    await asyncio.gather(some, alone)


async def test_a_call_larger_than_its_half_of_the_queue_is_let_in_when_it_is_empty() -> None:
    world = World(queue_limit=4, max_batch=8)
    first = await world.occupy_lane()
    call = world.submit_many(*"abcd")
    await settle()
    first.finish()
    (await world.search.next_call()).finish()
    assert len(await call) == 4


async def test_an_expired_call_keeps_the_outcomes_that_it_has() -> None:
    world = World(max_batch=1)
    call = world.submit_many("a", "b", "c", deadline_s=world.time.now_s + 1.0)
    (await world.search.next_call()).finish()
    on_lane = await world.search.next_call()
    world.time.advance(1.0)
    a, b, c = await call
    assert a.result == "hits of a"
    assert isinstance(b, DeadlineExceeded) and "searched" in str(b)
    assert isinstance(c, DeadlineExceeded) and "queue" in str(c)
    assert world.batcher.depth == 0
    assert world.observer.rejections == ["expired", "expired"]
    on_lane.finish()


async def test_an_abandoned_call_leaves_the_queue() -> None:
    world = World()
    first = await world.occupy_lane()
    call = world.submit_many("a", "b")
    await settle()
    call.cancel()
    await settle()
    assert (world.batcher.depth, world.observer.depth) == (0, 0)
    first.finish()
    await world.batcher.close()
    assert world.observer.batches == [(1, "lane_free")]


async def test_what_came_alone_goes_before_bulk_and_does_not_share_its_batches() -> None:
    world = World(max_batch=4)
    first = await world.occupy_lane()
    bulk = world.submit_many("b1", "b2")
    await settle()
    world.time.advance(0.001)
    alone = world.submit("alone")
    await settle()
    first.finish()
    order = []
    for _ in range(2):
        call = await world.search.next_call()
        order.append(names(call))
        call.finish()
    assert order == [["alone"], ["b1", "b2"]]
    await asyncio.gather(bulk, alone)


async def test_neither_kind_starves_the_other() -> None:
    """While both always wait, bulk gets about its share of the work."""
    world = World(max_batch=1, queue_limit=10_000, queue_work_limit=10**9)
    first = await world.occupy_lane()
    bulk = world.submit_many(*(f"b{n}" for n in range(100)))
    alone = [world.submit(f"i{n}") for n in range(300)]
    await settle()
    first.finish()
    order = []
    for _ in range(200):
        call = await world.search.next_call()
        order.append(names(call)[0][0])
        call.finish()
    for window in (order[:40], order[80:120], order[160:]):
        assert 8 <= window.count("b") <= 12
    for _ in range(200):
        (await world.search.next_call()).finish()
    await asyncio.gather(bulk, *alone)


async def test_bulk_is_served_while_single_queries_keep_coming_one_at_a_time() -> None:
    world = World(max_batch=1)
    first = await world.occupy_lane()
    bulk = world.submit_many("b1", "b2")
    tasks = []
    order = []
    call = first
    for n in range(9):
        tasks.append(world.submit(f"i{n}"))
        await settle()
        call.finish()
        call = await world.search.next_call()
        order.append(names(call)[0])
    call.finish()
    for _ in range(2):
        (await world.search.next_call()).finish()
    await asyncio.gather(bulk, *tasks)
    assert "b1" in order[:3]
    assert order.index("b2") > order.index("b1") + 1


async def test_a_query_that_would_expire_is_refused_on_arrival() -> None:
    world = World(max_batch=1)
    first = await world.occupy_lane()  # cost 10
    world.time.advance(0.5)
    first.finish()  # so 0.05 s a unit of cost
    await settle()
    second = await world.occupy_lane()
    waiting = world.submit("a", cost=30)  # 1.5 s of work
    await settle()
    # 1.5 s of work before it, half of a batch on the lane, and its own batch
    with pytest.raises(Overloaded, match="2250 ms") as refused:
        await world.batcher.submit(FakeQuery("late"), deadline_s=world.time.now_s + 2.0)
    assert refused.value.retry_after_s == pytest.approx(1.5)
    assert world.observer.rejections == ["too_late"]
    patient = world.submit("patient", deadline_s=world.time.now_s + 2.5)
    await settle()
    second.finish()
    for _ in range(2):
        (await world.search.next_call()).finish()
    await asyncio.gather(waiting, patient)


@pytest.mark.parametrize("late", [False, True])
async def test_who_gives_up_just_before_a_lane_is_free_is_not_searched(late: bool) -> None:
    """The lane is given its next batch before the task of who gave up has run."""
    world = World(max_batch=2)
    first = await world.occupy_lane()
    deadline_s = world.time.now_s + 1.0
    query = FakeQuery("gone")
    gone = [asyncio.create_task(world.batcher.submit(query, deadline_s=deadline_s)) for _ in range(2)]
    stays = world.submit("stays")
    await settle()
    if late:
        world.time.now_s = deadline_s
    first.finish()
    time.sleep(0.1)  # noqa: ASYNC251  # the lane says that it is free, and the loop has not heard of it
    for task in gone:
        task.cancel()
    call = await world.search.next_call()
    assert names(call) == ["stays"]
    call.finish()
    assert (await stays).result == "hits of stays"
    assert world.observer.depth == 0


async def test_those_who_were_let_in_and_are_not_here_yet_are_counted() -> None:
    world = World(max_batch=1, queue_limit=5)
    assert world.batcher.has_room(ahead=4), "though nobody knows yet what a query costs"
    first = await world.occupy_lane()
    waiting = world.submit("a")
    await settle()
    assert world.batcher.has_room(ahead=3)
    assert not world.batcher.has_room(ahead=4)
    with pytest.raises(Overloaded, match="5 queries are waiting"):
        world.batcher.refuse(ahead=4)
    first.finish()
    (await world.search.next_call()).finish()
    await waiting
    assert world.batcher.has_room(ahead=4), "with an empty queue too"
    assert not world.batcher.has_room(ahead=5)


async def test_what_has_not_been_read_is_taken_to_be_as_patient_as_those_before() -> None:
    world = World(max_batch=1, queue_limit=10_000)
    first = await world.occupy_lane()
    world.time.advance(0.5)
    first.finish()  # half a second a query
    await settle()
    for _ in range(400):  # those who waited for an hour are forgotten
        hasty = world.submit("hasty", deadline_s=world.time.now_s + 4.0)
        call = await world.search.next_call()
        world.time.advance(0.5)
        call.finish()
        await hasty
    waiting = [world.submit("held", deadline_s=world.time.now_s + 4.0)]
    held = await world.search.next_call()
    while world.batcher.has_room():
        waiting.append(world.submit("w", deadline_s=world.time.now_s + 4.0))
        await settle()
    # Not too late for who was read, but not worth reading who was not.
    assert world.observer.rejections == []
    with pytest.raises(Overloaded, match="an answer takes about"):
        world.batcher.refuse()
    assert world.observer.rejections == ["too_late"]
    patient = world.submit(
        "patient", deadline_s=world.time.now_s + 100.0
    )  # it came another way, and was read
    await settle()
    assert world.batcher.has_room()
    with pytest.raises(Overloaded):  # one who is in a hurry does not make the others so
        await world.batcher.submit(FakeQuery("hasty"), deadline_s=world.time.now_s + 0.1)
    assert world.batcher.has_room()
    held.finish()
    for _ in waiting:
        (await world.search.next_call()).finish()
    await asyncio.gather(*waiting, patient)


async def test_a_query_whose_deadline_would_pass_on_the_lane_is_not_searched() -> None:
    world = World()
    first = await world.occupy_lane()
    world.time.advance(0.5)
    first.finish()  # a batch takes 0.5 s
    await settle()
    second = await world.occupy_lane()
    tight = world.submit("tight", deadline_s=world.time.now_s + 1.0)
    await settle()
    loose = world.submit("loose")
    await settle()
    world.time.advance(0.6)  # longer than expected
    second.finish()
    call = await world.search.next_call()
    assert names(call) == ["loose"]
    with pytest.raises(DeadlineExceeded):
        await tight
    call.finish()
    await loose


async def test_a_query_that_is_alone_is_tried_whatever_is_expected() -> None:
    world = World()
    first = await world.occupy_lane()
    world.time.advance(5.0)  # a stall, after which no deadline would seem possible
    first.finish()
    await settle()
    for _ in range(2):
        asked = world.submit("asked", deadline_s=world.time.now_s + 1.0)
        call = await world.search.next_call()
        assert names(call) == ["asked"]
        call.finish()
        await asked


async def test_bulk_in_the_queue_hardly_delays_the_admission_of_what_comes_alone() -> None:
    world = World(queue_limit=100, queue_work_limit=10**6)
    first = await world.occupy_lane()
    world.time.advance(0.5)
    first.finish()
    await settle()
    second = await world.occupy_lane()
    bulk = world.submit_many(*(f"b{n}" for n in range(40)))  # 20 s of work
    await settle()
    alone = world.submit("alone", deadline_s=world.time.now_s + 1.0)
    await settle()
    second.finish()
    call = await world.search.next_call()
    assert names(call) == ["alone"]
    call.finish()
    await alone
    for _ in range(10):
        (await world.search.next_call()).finish()
    await bulk


async def test_who_has_waited_to_be_read_is_refused_earlier() -> None:
    world = World(max_batch=1)
    first = await world.occupy_lane()
    world.time.advance(0.5)
    first.finish()
    await settle()
    for _ in range(400):
        hasty = world.submit("hasty", deadline_s=world.time.now_s + 4.0)
        call = await world.search.next_call()
        world.time.advance(0.5)
        call.finish()
        await hasty
    # Half of a batch on average and its own take 0.75 s; half of the patience is 2 s.
    assert world.batcher.has_room(unread_s=1.2)
    assert not world.batcher.has_room(unread_s=1.3)
    with pytest.raises(Overloaded, match="an answer takes about"):
        world.batcher.refuse(unread_s=1.3)
    world.batcher.refuse(unread_s=1.2)


async def test_queries_without_anything_to_score_are_searched_like_others() -> None:
    """A filter that admits nothing makes one, and it may be all that was ever asked."""
    world = World()
    for ask in (world.submit, world.submit, world.submit_many):  # while a rate is learnt, and by it
        first = ask("first", cost=0)
        call = await world.search.next_call()
        second = ask("second", cost=0)
        await settle()
        assert world.batcher.has_room()
        world.time.advance(0.1)
        call.finish()
        (await world.search.next_call()).finish()
        await asyncio.gather(first, second)
