"""NANN's rules of samples, against cases worked out by hand (reference/nann.md, "Data")."""

from __future__ import annotations

import numpy as np
import pytest

from nann.offline.data import rules


@pytest.mark.parametrize(("length", "position"), [(8, 7), (9, 8), (10, 8), (11, 9), (60, 33), (61, 34)])
def test_the_held_out_position_is_in_the_middle_of_what_follows_seven(length: int, position: int) -> None:
    assert rules.eval_position(np.array([length])).tolist() == [position]


@pytest.mark.parametrize(("length", "count"), [(1, 0), (11, 0), (12, 1), (13, 2), (60, 49)])
def test_train_samples_are_positions_ten_to_the_last_but_one(length: int, count: int) -> None:
    assert rules.train_sample_counts(np.array([length])).tolist() == [count]
    assert count == len(range(10, length - 1))


def test_histories_are_oldest_first_and_padded_at_the_end() -> None:
    items = np.arange(100, 170, dtype=np.int32)
    start, position = np.array([0, 10, 0]), np.array([3, 55, 0])
    histories = rules.histories_before(items, start, position)
    assert histories.dtype == np.int32
    assert histories.shape == (3, 50)
    assert histories[0].tolist() == [100, 101, 102] + [-1] * 47
    assert histories[1].tolist() == list(range(115, 165))
    assert histories[2].tolist() == [-1] * 50


def test_only_users_with_more_than_seven_behaviours_are_split() -> None:
    lengths = np.array([7] * 30 + [8] * 100 + [1] * 20)
    split = rules.split_users(lengths, seed=3)
    assert (split[:30] == rules.INELIGIBLE).all()
    assert (split[130:] == rules.INELIGIBLE).all()
    assert np.bincount(split[30:130], minlength=3).tolist() == [80, 10, 10]


def test_at_most_ten_thousand_users_are_held_out() -> None:
    split = rules.split_users(np.full(150_000, 20), seed=0)
    assert np.bincount(split).tolist() == [130_000, 10_000, 10_000]


def test_the_split_follows_the_seed() -> None:
    lengths = np.full(500, 9)
    assert (rules.split_users(lengths, 1) == rules.split_users(lengths, 1)).all()
    assert (rules.split_users(lengths, 1) != rules.split_users(lengths, 2)).any()


def test_too_few_users_for_a_tenth_leave_all_to_training() -> None:
    assert rules.split_users(np.full(9, 30), 0).tolist() == [0] * 9
