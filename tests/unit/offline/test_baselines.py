from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nann.offline.baselines import Baseline, ItemKnn, Popularity, Random, evaluate_baselines
from nann.offline.data.dataset import Dataset
from nann.offline.data.prepare import prepare
from nann.offline.data.synthetic import generate_user_behavior


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("baselines")
    log = directory / "UserBehavior.csv"
    generate_user_behavior(log, num_items=1_500, num_categories=30, num_users=500, mean_events=40, seed=2)
    prepare(log, directory / "data")
    return Dataset.load(directory / "data")


def _training_rows(dataset: Dataset) -> list[list[int]]:
    splits = dataset.user_row_splits
    return [dataset.user_items[splits[u] : splits[u + 1]].tolist() for u in dataset.users_of("train")]


def test_popularity_counts_training_users_only(dataset: Dataset) -> None:
    counts = np.bincount(np.concatenate(_training_rows(dataset)), minlength=dataset.num_items)
    expected = sorted(range(dataset.num_items), key=lambda i: (-counts[i], i))[:20]
    answers = Popularity.fit(dataset).top_k(np.full((3, 50), -1, np.int32), 20)
    assert answers.tolist() == [expected] * 3


def test_item_knn_equals_cosine_worked_out_densely(dataset: Dataset) -> None:
    rows = _training_rows(dataset)
    matrix = np.zeros((len(rows), dataset.num_items))
    for row, items in enumerate(rows):
        np.add.at(matrix[row], items, 1.0)
    length = np.linalg.norm(matrix, axis=0)
    similarity = (matrix.T @ matrix) / np.maximum(np.outer(length, length), 1e-12)
    np.fill_diagonal(similarity, 0)
    _, histories, _ = dataset.eval_samples("test")
    knn = ItemKnn.fit(dataset, neighbours=dataset.num_items)  # no neighbour cut off
    answers = knn.top_k(histories, 20)
    for history, answer in zip(histories, answers, strict=True):
        scores = similarity[np.unique(history[history >= 0])].sum(axis=0)
        assert scores[answer] == pytest.approx(np.sort(scores)[::-1][:20], abs=1e-4)


def test_item_knn_goes_on_with_popular_items(dataset: Dataset) -> None:
    empty = np.full((1, 50), -1, np.int32)
    knn = ItemKnn.fit(dataset, neighbours=3)
    popular = Popularity.fit(dataset).top_k(empty, 60)[0].tolist()
    assert knn.top_k(empty, 60)[0].tolist() == popular
    one = empty.copy()
    one[0, 0] = popular[0]
    answer = knn.top_k(one, 60)[0].tolist()
    neighbours = knn.similarity[popular[0]].indices.tolist()
    assert 1 <= len(neighbours) <= 3
    assert set(answer[: len(neighbours)]) == set(neighbours)
    assert answer[len(neighbours) :] == [i for i in popular if i not in neighbours][: 60 - len(neighbours)]


def test_random_is_fair_and_seeded() -> None:
    histories = np.full((20_000, 50), -1, np.int32)
    answers = Random(40, seed=3).top_k(histories, 10)
    assert (answers == Random(40, seed=3).top_k(histories, 10)).all()
    share = np.bincount(answers.ravel(), minlength=40) / answers.size
    assert share == pytest.approx(np.full(40, 1 / 40), rel=0.1)


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("k", [7, 200])
def test_answers_are_distinct_and_honour_what_was_seen(dataset: Dataset, k: int, exclude_seen: bool) -> None:
    _, histories, _ = dataset.eval_samples("test")
    baselines: list[Baseline] = [
        Popularity.fit(dataset),
        Random(dataset.num_items),
        ItemKnn.fit(dataset, neighbours=20, weighting="bm25"),
    ]
    for baseline in baselines:
        answers = baseline.top_k(histories, k, exclude_seen=exclude_seen)
        assert answers.shape == (len(histories), k)
        saw_seen = False
        for history, answer in zip(histories, answers, strict=True):
            assert answer.min() >= 0
            assert len(set(answer.tolist())) == k
            saw_seen |= bool(set(answer.tolist()) & set(history.tolist()))
        assert saw_seen != exclude_seen


def test_all_items_but_the_seen_end_in_padding() -> None:
    ranking = Popularity(np.array([2, 0, 1], np.int32))
    histories = np.array([[0, -1], [-1, -1]], np.int32)
    assert ranking.top_k(histories, 3, exclude_seen=True).tolist() == [[2, 1, -1], [2, 0, 1]]


def test_planted_interests_rank_the_baselines(dataset: Dataset) -> None:
    results = evaluate_baselines(dataset, k=50)
    rates = {result.name: result.metrics.hit_rate for result in results}
    assert rates["item-kNN (cosine)"] > 3 * rates["popularity"]
    assert rates["item-kNN (bm25)"] > 3 * rates["popularity"]
    for result in results:
        assert result.hit_rate.low <= result.metrics.hit_rate <= result.hit_rate.high


def test_baselines_can_do_without_implicit(dataset: Dataset, tmp_path: Path) -> None:
    names = [result.name for result in evaluate_baselines(dataset, with_item_knn=False)]
    assert names == ["random", "popularity"]
