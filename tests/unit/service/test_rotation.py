from __future__ import annotations

import random

import pytest

from nann.service.rotation import Rotation


def taken(rotation: Rotation) -> int:
    lane = rotation.next_lane()
    assert lane is not None
    rotation.take(lane)
    return lane


def test_every_lane_is_given_out_once_and_the_last_one_freed_first() -> None:
    rotation = Rotation(("cpu",) * 3)
    assert {taken(rotation) for _ in range(3)} == {0, 1, 2}
    assert (rotation.next_lane(), rotation.n_busy) == (None, 3)
    for lane in (1, 0, 2):
        rotation.give_back(lane, succeeded=True)
    assert [taken(rotation) for _ in range(3)] == [2, 0, 1]


def test_traffic_goes_to_the_device_with_the_fewest_busy_lanes() -> None:
    rotation = Rotation(("cuda:0", "cuda:0", "cuda:1", "cuda:1"))
    assert {taken(rotation) // 2, taken(rotation) // 2} == {0, 1}
    assert {taken(rotation) // 2, taken(rotation) // 2} == {0, 1}


def test_a_failure_casts_doubt_on_its_device_only_and_each_lane_must_prove_itself() -> None:
    rotation = Rotation(("cuda:0", "cuda:0", "cuda:1", "cuda:1"))
    rotation.take(0)
    rotation.give_back(0, succeeded=False)
    assert (rotation.n_proven, rotation.doubted) == (2, (0, 1))
    assert {taken(rotation), taken(rotation)} == {2, 3}
    assert rotation.next_lane() is None  # free lanes are left, but not for traffic
    rotation.take(1)
    rotation.give_back(1, succeeded=True)
    assert (rotation.doubted, rotation.next_lane()) == ((0,), 1)


def test_a_lane_that_was_searching_when_its_neighbour_failed_is_judged_by_its_own_search() -> None:
    rotation = Rotation(("cuda:0", "cuda:0", "cuda:1"))
    rotation.take(0)
    rotation.take(1)
    rotation.give_back(0, succeeded=False)
    assert rotation.doubted == (0,)  # lane 1 is still busy
    rotation.give_back(1, succeeded=True)
    assert (rotation.doubted, rotation.n_proven) == ((0,), 2)


def test_a_lane_that_fails_again_says_nothing_new_of_its_neighbours() -> None:
    rotation = Rotation(("cuda:0", "cuda:0"))
    for lane, succeeded in [(0, False), (1, True), (0, False)]:
        rotation.take(lane)
        rotation.give_back(lane, succeeded=succeeded)
    assert (rotation.doubted, rotation.next_lane()) == ((0,), 1)


def test_while_nothing_is_proven_traffic_may_try_any_lane() -> None:
    rotation = Rotation(("cpu", "cpu"))
    rotation.take(0)
    rotation.give_back(0, succeeded=False)
    assert (rotation.n_proven, rotation.next_lane()) == (0, 0)
    rotation.take(1)
    rotation.give_back(1, succeeded=True)
    assert rotation.next_lane() == 1
    rotation.take(1)
    assert rotation.next_lane() is None


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_no_lane_is_ever_lost_or_given_out_too_often(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    groups = tuple(rng.randrange(3) for _ in range(6))
    rotation = Rotation(groups, depth=depth)
    busy: list[int] = []
    for _ in range(500):
        if busy and rng.random() < 0.5:
            rotation.give_back(busy.pop(rng.randrange(len(busy))), succeeded=rng.random() < 0.7)
            continue
        doubted = rotation.doubted
        lane = rng.choice(doubted) if doubted and rng.random() < 0.3 else rotation.next_lane()
        if lane is not None:
            assert lane not in busy
        elif rotation.lanes_with_room():
            lane = rng.choice(rotation.lanes_with_room())
            assert 0 < busy.count(lane) < depth
        if lane is not None:
            rotation.take(lane)
            busy.append(lane)
        assert rotation.n_busy == len(set(busy))
        assert rotation.n_proven or len(set(busy)) == 6 or rotation.next_lane() is not None
    for lane in busy:
        rotation.give_back(lane, succeeded=True)
    assert sorted(taken(rotation) for _ in range(rotation.n_proven)) == sorted(
        set(range(6)) - set(rotation.doubted)
    )


def test_a_lane_is_to_spare_when_another_proven_one_stays_free() -> None:
    rotation = Rotation(["cuda:0", "cuda:0", "cuda:1"])
    assert rotation.spare_lane() == rotation.next_lane()
    rotation.take(2)
    assert rotation.spare_lane() is not None
    rotation.take(1)
    assert (rotation.next_lane(), rotation.spare_lane()) == (0, None)


def test_a_lane_in_doubt_is_neither_to_spare_nor_left_for_others() -> None:
    rotation = Rotation(["cuda:0", "cuda:1"])
    rotation.take(1)
    rotation.give_back(1, succeeded=False)
    assert (rotation.next_lane(), rotation.spare_lane()) == (0, None)


def test_the_only_lane_is_to_spare_while_it_is_free_and_proven() -> None:
    rotation = Rotation(["cpu"])
    assert rotation.spare_lane() == 0
    rotation.take(0)
    assert rotation.spare_lane() is None
    rotation.give_back(0, succeeded=False)
    assert rotation.spare_lane() is None


def test_a_lane_takes_more_batches_than_one_only_while_it_searches_and_is_proven() -> None:
    rotation = Rotation(["cuda:0", "cuda:0", "cuda:1"], depth=2)
    assert rotation.lanes_with_room() == []
    rotation.take(0)
    rotation.take(1)
    assert rotation.lanes_with_room() == [0, 1]
    rotation.take(0)
    assert (rotation.lanes_with_room(), rotation.n_busy, rotation.next_lane()) == ([1], 2, 2)
    rotation.give_back(0, succeeded=True)
    assert (rotation.lanes_with_room(), rotation.n_busy) == ([0, 1], 2), "it still has one"
    rotation.give_back(0, succeeded=True)
    assert (rotation.lanes_with_room(), rotation.n_busy) == ([1], 1)
    rotation.take(0)
    rotation.give_back(1, succeeded=False)
    assert rotation.lanes_with_room() == [], "its device is in doubt"
