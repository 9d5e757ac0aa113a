"""Batches at hand: those that a busy lane has for afterwards."""

from __future__ import annotations

import asyncio

import pytest
from batcher_world import World, names
from fake_engine import FakeQuery, settle

from nann.engine.errors import BackendError, DeadlineExceeded, Overloaded


async def test_a_busy_lane_takes_a_full_batch_for_afterwards_and_no_other() -> None:
    world = World(lane_depth=2)
    first = await world.occupy_lane()
    tasks = [world.submit(name) for name in "abc"]
    await settle()
    assert world.batcher.depth == 3, "who may still get company waits where it comes"
    tasks.append(world.submit("d"))
    second = await world.search.next_call()
    assert (names(second), second.lane, world.batcher.depth, world.batcher.lanes_busy) == (
        list("abcd"),
        0,
        0,
        1,
    )
    tasks += [world.submit(name) for name in "efgh"]
    await settle()
    assert world.batcher.depth == 4, "the lane has all that it takes"
    assert world.observer.busy == 1
    first.finish()
    third = await world.search.next_call()
    assert names(third) == list("efgh")
    second.finish()
    third.finish()
    assert [(await task).result for task in tasks] == [f"hits of {name}" for name in "abcdefgh"]
    await world.batcher.close()
    assert (world.observer.busy, world.observer.depth) == (0, 0)
    assert world.observer.batches == [(1, "lane_free"), (4, "full"), (4, "full")]


async def test_a_batch_at_hand_begins_when_the_one_before_it_ends() -> None:
    world = World(lane_depth=2)
    occupant = world.submit("occupant")
    first = await world.search.next_call()
    tasks = [world.submit(name) for name in "abcd"]
    second = await world.search.next_call()
    world.time.advance(0.5)
    assert world.observer.waits_s == [0.0]
    first.finish()
    await occupant
    assert world.observer.waits_s == [0.0] + [0.5] * 4
    world.time.advance(0.25)
    second.finish()
    answers = [await task for task in tasks]
    assert {(answer.queue_s, answer.search_s) for answer in answers} == {(0.5, 0.25)}
    assert world.observer.searches_s == [0.5, 0.25]


async def test_a_batch_at_hand_waits_on_the_lane_that_began_first() -> None:
    world = World(n_lanes=2, lane_depth=2)
    early = await world.occupy_lane()
    world.time.advance(0.1)
    late = await world.occupy_lane()
    for name in "abcdefgh":
        world.submit(name)
    at_hand = [await world.search.next_call() for _ in range(2)]
    assert {call.lane: "".join(names(call)) for call in at_hand} == {early.lane: "abcd", late.lane: "efgh"}
    for call in (early, late, *at_hand):
        call.finish()
    await world.batcher.close()


async def test_nobody_waits_on_a_lane_that_searches_something_else() -> None:
    """A scan of everything, or a sample for the operator, may take a hundred times as long."""
    world = World(n_lanes=2, lane_depth=2)
    shadow = asyncio.create_task(world.batcher.search_if_idle(FakeQuery("shadow")))
    one = await world.search.next_call()
    world.submit("scan", compat="scan")
    two = await world.search.next_call()
    for name in "abcd":
        world.submit(name)
    await settle()
    assert world.batcher.depth == 4
    two.finish()
    three = await world.search.next_call()
    assert (names(three), three.lane) == (list("abcd"), two.lane)
    one.finish()
    three.finish()
    await shadow
    await world.batcher.close()


async def test_a_failure_leaves_the_batch_behind_it_to_its_own_fate() -> None:
    world = World(lane_depth=2)
    lost = world.submit("lost")
    first = await world.search.next_call()
    tasks = [world.submit(name) for name in "abcd"]
    second = await world.search.next_call()
    first.finish(error=BackendError("lost"))
    with pytest.raises(BackendError):
        await lost
    assert world.proven == [0]
    for name in "efgh":
        world.submit(name)
    await settle()
    assert world.batcher.depth == 4, "a lane in doubt gets nothing for afterwards"
    second.finish()
    assert [(await task).result for task in tasks] == [f"hits of {name}" for name in "abcd"]
    assert world.proven == [0, 1]
    (await world.search.next_call()).finish()
    await world.batcher.close()


async def test_those_at_hand_count_for_who_comes_after_them() -> None:
    world = World(lane_depth=2)
    warm = world.submit("warm")
    call = await world.search.next_call()
    world.time.advance(0.4)  # a query of cost 10 takes 0.4 s, and so does a batch
    call.finish()
    await warm
    first = await world.occupy_lane()
    for name in "abcd":
        world.submit(name)
    second = await world.search.next_call()
    world.submit("next")
    await settle()
    # Before it: half of a batch on average, one at hand, and the one that it will be in.
    hasty = world.submit("hasty", deadline_s=world.time.clock() + 0.95)
    with pytest.raises(Overloaded):
        await hasty
    patient = world.submit("patient", deadline_s=world.time.clock() + 1.5)
    await settle()
    assert world.batcher.depth == 2
    first.finish()
    second.finish()
    (await world.search.next_call()).finish()
    await patient


async def test_who_would_be_late_behind_what_the_lane_has_is_not_sent_there() -> None:
    world = World(lane_depth=2)
    warm = world.submit("warm")
    call = await world.search.next_call()
    world.time.advance(0.4)
    call.finish()
    await warm
    first = await world.occupy_lane()
    hasty = world.submit("hasty", deadline_s=world.time.clock() + 0.5)  # nobody waits: it is let in
    others = [world.submit(name) for name in "abcd"]
    with pytest.raises(DeadlineExceeded):  # the lane is free in 0.4 s and another batch takes as long
        await hasty
    second = await world.search.next_call()
    assert names(second) == list("abcd")
    first.finish()
    second.finish()
    await asyncio.gather(*others)
