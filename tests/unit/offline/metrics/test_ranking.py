from __future__ import annotations

import math

import numpy as np
import pytest

from nann.offline.metrics.ranking import (
    bootstrap_mean,
    held_out_metrics,
    hits_at_k,
    id_overlap_at_k,
    ndcg_at_k,
    percentiles,
    recall_at_k,
)

RETRIEVED = np.array([[4, 2, 9, 7], [1, 3, 5, 8], [6, 0, -1, -1], [2, 4, 6, 8]])
TARGETS = np.array([9, 7, 0, 2])


def test_hits_and_ndcg_by_hand() -> None:
    assert hits_at_k(RETRIEVED, TARGETS, 4).tolist() == [True, False, True, True]
    assert hits_at_k(RETRIEVED, TARGETS, 2).tolist() == [False, False, True, True]
    assert ndcg_at_k(RETRIEVED, TARGETS, 4).tolist() == pytest.approx([1 / 2, 0, 1 / math.log2(3), 1])
    assert ndcg_at_k(RETRIEVED, TARGETS, 1).tolist() == [0, 0, 0, 1]


def test_held_out_metrics_by_hand() -> None:
    metrics = held_out_metrics(RETRIEVED, TARGETS, 4)
    assert (metrics.k, metrics.n_users) == (4, 4)
    assert metrics.hit_rate == metrics.recall == 3 / 4
    assert metrics.precision == 3 / 16
    assert metrics.f1 == pytest.approx(3 / 4 * 2 / 5)
    means = 2 * metrics.precision * metrics.recall / (metrics.precision + metrics.recall)
    assert metrics.f1 == pytest.approx(means)


def test_nothing_found_is_zero_not_a_warning() -> None:
    metrics = held_out_metrics(np.full((2, 3), -1), np.array([1, 2]), 3)
    assert (metrics.hit_rate, metrics.f1, metrics.ndcg) == (0, 0, 0)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hits_at_k(RETRIEVED, TARGETS, k)


def test_recall_by_score_takes_ties_for_found() -> None:
    exhaustive = np.array([[5.0, 4.0, 4.0]])
    assert recall_at_k(np.array([[5.0, 4.0, 4.0]]), exhaustive, 3).tolist() == [1.0]
    assert recall_at_k(np.array([[5.0, 4.0, 3.9]]), exhaustive, 3).tolist() == pytest.approx([2 / 3])
    assert recall_at_k(np.array([[5.0, 4.0, 3.9]]), exhaustive, 3, tolerance=0.2).tolist() == [1.0]


def test_recall_of_short_rows() -> None:
    infinite = -np.inf
    # Only two were admissible, and one of them was found.
    assert recall_at_k(np.array([[5.0, infinite, np.nan]]), np.array([[5.0, 1.0, infinite]]), 3).tolist() == [
        0.5
    ]
    assert recall_at_k(np.full((1, 3), infinite), np.full((1, 3), infinite), 3).tolist() == [1.0]
    assert recall_at_k(np.full((1, 3), infinite), np.array([[3.0, 2.0, 1.0]]), 3).tolist() == [0.0]
    # A narrower answer than asked for is a short one.
    assert recall_at_k(np.array([[3.0]]), np.array([[3.0, 2.0, 1.0]]), 3).tolist() == pytest.approx([1 / 3])


def test_overlap_by_id_equals_sets() -> None:
    rng = np.random.default_rng(0)
    got = np.stack([rng.permutation(30)[:10] for _ in range(50)])
    wanted = np.stack([rng.permutation(30)[:12] for _ in range(50)])
    got[:10, 7:] = -1
    wanted[:5, 8:] = -1
    expected = []
    for a, b in zip(got[:, :10], wanted[:, :10], strict=True):
        relevant = set(b[b >= 0].tolist())
        expected.append(len(relevant & set(a[a >= 0].tolist())) / len(relevant))
    assert id_overlap_at_k(got, wanted, 10).tolist() == pytest.approx(expected)
    assert 0 < np.mean(expected) < 1


def test_percentiles_over_users() -> None:
    assert percentiles(np.arange(101.0), (50, 99.9)) == {"p50": 50.0, "p99.9": pytest.approx(99.9)}
    with pytest.raises(ValueError, match="no values"):
        percentiles(np.empty(0))


def test_bootstrap_interval_is_seeded_and_covers_the_mean() -> None:
    values = (np.random.default_rng(0).random(2_000) < 0.3).astype(float)
    interval = bootstrap_mean(values, seed=4)
    assert interval == bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)
    assert interval.low < interval.mean < interval.high
    assert interval.mean == values.mean()
    # The normal approximation of a proportion: 1.96 standard errors either side.
    assert (interval.high - interval.low) / 2 == pytest.approx(
        1.96 * values.std() / math.sqrt(2_000), rel=0.15
    )


def test_bootstrap_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(np.empty(0))
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean(np.ones(3), confidence=95)
