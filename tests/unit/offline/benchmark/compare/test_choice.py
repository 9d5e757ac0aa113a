"""Which settings are shown, and how costs are compared."""

from __future__ import annotations

import numpy as np
import pytest

from nann.offline.benchmark.compare.choice import (
    Point,
    bootstrap_percentile,
    cheapest_reaching,
    pareto,
    point,
    ratio,
    thinned,
    worth_measuring,
)
from nann.offline.benchmark.compare.contender import Setting
from nann.offline.benchmark.compare.quality import Measured
from nann.offline.metrics.ranking import Interval


def _point(recall: float, cost: float) -> Point:
    def exactly(value: float) -> Interval:
        return Interval(value, value, value)

    return Point("", {}, 10, exactly(recall), exactly(recall), exactly(0.5), exactly(cost), cost)


POINTS = [_point(0.9, 100), _point(0.8, 120), _point(0.99, 300), _point(0.95, 90), _point(0.99, 400)]


def test_the_front_has_only_points_that_find_more_for_more() -> None:
    assert pareto(POINTS) == [3, 2]


def test_the_cheapest_that_reaches_a_target() -> None:
    assert cheapest_reaching(POINTS, 0.9) == 3
    assert cheapest_reaching(POINTS, 0.96) == 2
    assert cheapest_reaching(POINTS, 0.995) is None


def test_only_what_another_clearly_beats_is_not_measured_further() -> None:
    # 0.95 for 90 beats 0.9 for 100 and 0.8 for 120; what costs more for as much may turn out better.
    assert worth_measuring(POINTS) == [2, 3, 4]
    near = [_point(0.950, 100), _point(0.954, 90), _point(0.956, 100)]
    assert worth_measuring(near) == [1, 2]
    assert worth_measuring([POINTS[0], POINTS[0]]) == [0, 1]


def test_thinning_keeps_the_ends_and_what_was_chosen() -> None:
    assert thinned(list(range(10)), 3, [7]) == [0, 4, 7, 9]
    assert thinned([4, 2], 5, []) == [4, 2]
    assert thinned([1, 2, 3], 0, [2]) == [2]


def test_a_ratio_resamples_users_together() -> None:
    cost = np.random.default_rng(0).uniform(1, 100, 200)
    found = ratio(8 * cost, cost)
    # Users resampled apart would give an interval, of a ratio that is the same for every user.
    assert (found.mean, found.low, found.high) == pytest.approx((8, 8, 8))


def test_a_percentile_lies_in_its_interval() -> None:
    values = np.arange(1000) / 1000
    found = bootstrap_percentile(values, 5)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(0.05, abs=0.001)


def test_cost_counts_other_products_in_scores() -> None:
    measured = Measured(
        Setting("a", {"ef": 3}),
        np.array([1.0, 0.5]),
        np.array([True, False]),
        np.array([100, 300]),
        np.array([80.0, 80.0]),
    )
    found = point(measured, 8.0)
    assert found.cost.mean == pytest.approx(200 + 10)
    assert found.n_scored == 200
    assert found.recall.mean == 0.75
    assert found.hit_rate.mean == 0.5
    assert found.setting == "ef 3"
