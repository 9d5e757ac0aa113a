"""Replayed searches find what they should, count what they score, and are compared at equal recall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nann.offline.benchmark.replay import walks
from nann.offline.benchmark.replay.gradients import guided
from nann.offline.benchmark.replay.graphs import co_read, nsg, pruned, score_vectors
from nann.offline.benchmark.replay.measure import K, Point, Scratch, Users, at_recall, pareto, replay

NUM_ITEMS = 1000


@pytest.fixture(scope="module")
def users() -> Users:
    """Scores that fall with the distance from a place on a ring, whose neighbours the graph links."""
    places = np.array([100, 700])
    gap = np.abs(np.arange(NUM_ITEMS)[None] - places[:, None])
    scores = -np.minimum(gap, NUM_ITEMS - gap).astype(np.float32)
    kth = np.array([np.partition(row, -K)[-K] for row in scores])
    return Users(places[:, None].astype(np.int32), scores, kth)


@pytest.fixture(scope="module")
def ring() -> np.ndarray:
    steps = np.array([1, -1, 2, -2])
    return ((np.arange(NUM_ITEMS)[:, None] + steps) % NUM_ITEMS).astype(np.int32)


def _best_first(users: Users, ring: np.ndarray, *, ef: int, patience: int = 0, most: int = 1000) -> Point:
    def search(user: int, scores: np.ndarray, scratch: Scratch) -> tuple[int, int, np.ndarray]:
        return walks.best_first(
            scores, ring, users.history[user], scratch.visited, scratch.stamp,
            ef, 4, 4, K, patience, 0.0, 1e9, 1.0, most,
        )  # fmt: skip

    return replay("best first", users, search)


def test_a_walk_from_the_best_item_finds_the_answer_and_little_else(users: Users, ring: np.ndarray) -> None:
    point = _best_first(users, ring, ef=K)
    assert point.recall == 1
    assert K <= point.scored < K + 10


def test_a_small_pool_scores_less_and_the_answer_is_still_of_200(users: Users, ring: np.ndarray) -> None:
    point = _best_first(users, ring, ef=100)
    assert 0.5 < point.recall < 0.6
    assert point.scored < 110


def test_a_walk_stops_when_told(users: Users, ring: np.ndarray) -> None:
    assert _best_first(users, ring, ef=K, most=3).steps == 4  # the first takes in the starting nodes
    assert _best_first(users, ring, ef=900, patience=2).scored < _best_first(users, ring, ef=900).scored


def test_one_vote_is_plain_best_first(users: Users, ring: np.ndarray) -> None:
    def search(least: int) -> Point:
        return replay(
            "voted",
            users,
            lambda user, scores, scratch: walks.voted(
                scores,
                ring,
                users.history[user],
                scratch.visited,
                scratch.stamp,
                scratch.votes,
                K,
                4,
                least,
                0,
            ),
        )

    plain = _best_first(users, ring, ef=K)
    assert (search(1).recall, search(1).scored) == (plain.recall, plain.scored)
    assert search(3).scored < plain.scored


def test_nanns_searches_count_the_entry_points_and_every_new_neighbour(
    users: Users, ring: np.ndarray
) -> None:
    entries = np.array([90, 710], np.int32)
    topn = np.array([1, 4, 4, 4, 4, 12])

    def level(user: int, scores: np.ndarray, scratch: Scratch) -> tuple[int, int, np.ndarray]:
        return walks.level(scores, ring, ring, entries, scratch.visited, scratch.stamp, topn)

    # 2 entry points, the 4 neighbours of the better; the best 4 of 88 … 92 open 87, 88, 93, 94, and so on.
    scored, _, found = level(0, users.scores[0], Scratch(NUM_ITEMS).next())
    assert scored == 6 + 3 * 4
    assert sorted(found) == list(range(87, 99))  # each once, those of the pool among them

    def evaluated(ef: int) -> Point:
        efs, steps = np.array([ef, ef, ef]), np.array([200, 1, 1])
        return replay(
            "evaluated",
            users,
            lambda user, scores, scratch: walks.evaluated(
                scores, ring, ring, entries, scratch.visited, scratch.stamp, efs, steps
            ),
        )

    assert evaluated(K).recall == 1
    assert evaluated(20).recall < 0.2


def test_cost_at_a_recall_is_read_off_the_front() -> None:
    points = [Point("", recall, recall, cost, 1) for recall, cost in ((0.9, 100), (0.99, 400), (0.95, 900))]
    assert [point.scored for point in pareto(points)] == [100, 400]
    # Halfway between 0.1 and 0.01 missed, in logarithms.
    assert at_recall(points, 1 - 0.1**1.5) == pytest.approx(200)
    assert np.isnan(at_recall(points, 0.995))
    assert np.isnan(at_recall(points, 0.5))


def test_pruning_drops_what_a_nearer_neighbour_covers() -> None:
    vectors = np.array([[0, 0], [1, 0], [1.5, 0], [0, 2]], np.float32)
    nearest = np.array([[1, 2, 3], [2, 0, 3], [1, 0, 3], [0, 1, 2]], np.int32)
    assert pruned(vectors, nearest, 1.0, 3)[0].tolist() == [1, 3, -1]
    assert pruned(vectors, nearest, 10.0, 3)[0].tolist() == [1, 2, 3]


def test_co_read_counts_one_users_clicks_near_each_other() -> None:
    items = np.array([0, 1, 2, 0, 3], np.int32)
    user = np.array([7, 7, 7, 8, 8], np.int32)
    table = co_read(items, user, 4, window=2, degree=3)
    assert table[0].tolist()[:2] in ([1, 3], [3, 1])
    assert table[0, 2] == 2
    assert table[3].tolist() == [0, -1, -1]


class _Slope:
    """The gradient of a score that is linear in the embedding."""

    def __init__(self, direction: np.ndarray) -> None:
        self._direction = direction

    def encode(self, _history: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def of(self, _user: dict[str, np.ndarray], items: np.ndarray) -> np.ndarray:
        return np.tile(self._direction, (len(items), 1))


def _guided(keep: float, price: float, rule: str = "estimate") -> tuple[int, int, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(NUM_ITEMS, 4)).astype(np.float32)
    direction = np.array([1.0, -2.0, 0.5, 0.0], dtype=np.float32)
    scores = embeddings @ direction
    graph = rng.integers(0, NUM_ITEMS, (NUM_ITEMS, 12)).astype(np.int32)
    slope: Any = _Slope(direction)
    scored, steps, found = guided(
        scores, graph, np.arange(300, dtype=np.int32), embeddings, slope, np.zeros(1, np.int32),
        ef=K, rule=rule, keep=keep, price=price,  # type: ignore[arg-type]
    )  # fmt: skip
    return scored, steps, found, np.argsort(-scores)[:K]


def test_a_perfect_gradient_saves_scores_and_loses_nothing() -> None:
    every, _, found, best = _guided(1e9, 0.0)
    assert len(np.intersect1d(found, best)) >= 0.9 * K
    few, _, same, _ = _guided(0.0, 0.0)
    assert sorted(same) == sorted(found), "a linear score is what its gradient says"
    assert few < 0.7 * every


def test_a_gradient_has_its_price() -> None:
    free, steps, _, _ = _guided(0.0, 0.0)
    dear, same_steps, _, _ = _guided(0.0, 2.0)
    assert steps == same_steps
    assert dear - free >= 2 * K  # at least the pool's items were expanded


def test_by_angle_a_share_of_the_neighbours_is_scored() -> None:
    half, *_ = _guided(0.5, 0.0, "angle")
    whole, *_ = _guided(1.0, 0.0, "angle")
    assert half < whole


def test_nsg_links_every_item_to_others() -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    nearest = np.argsort(((vectors[:, None] - vectors[None]) ** 2).sum(-1), axis=1)[:, 1:33].astype(np.int32)
    table = nsg(vectors, nearest, 8)
    assert table.shape == (600, 8)
    assert table.max() < 600
    assert (table >= 0).any(axis=1).all()
    assert not (table == np.arange(600)[:, None]).any()


def test_items_that_users_score_alike_lie_near_each_other() -> None:
    rng = np.random.default_rng(0)
    taste = rng.normal(size=(50, 2))  # of each user for either group
    group = np.arange(200) % 2
    scores = (taste[:, group] + 0.1 * rng.normal(size=(50, 200))).astype(np.float32)
    vectors = score_vectors(scores, 4)
    assert vectors.shape == (200, 4)
    distance = ((vectors[:, None] - vectors[None]) ** 2).sum(-1) + 1e9 * np.eye(200)
    assert (group[distance.argmin(axis=1)] == group).all()
