from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nann.offline.baselines import Popularity
from nann.offline.data.dataset import Dataset
from nann.offline.data.prepare import prepare
from nann.offline.data.synthetic import generate_user_behavior
from nann.offline.metrics.ranking import hits_at_k

SIZES = {"num_items": 3_000, "num_categories": 60, "num_users": 600, "mean_events": 40}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("synthetic")
    generate_user_behavior(directory / "source" / "UserBehavior.csv", **SIZES, seed=1)
    prepare(directory / "source", directory / "data", strict=True)
    return Dataset.load(directory / "data")


def test_it_has_the_sizes_asked_for(dataset: Dataset) -> None:
    assert dataset.num_users == 600
    assert dataset.num_categories == 60
    assert 0.98 * 3_000 < dataset.num_items <= 3_000
    assert 30 < dataset.user_lengths.mean() < 50
    assert dataset.items["title"].null_count() == 0
    assert dataset.items["title"].n_unique() == dataset.num_items


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_user_behavior(tmp_path / name / "log.csv", **SIZES, seed=seed)
    read = {name: (tmp_path / name / "log.csv").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert (tmp_path / "a" / "items.csv").read_bytes() == (tmp_path / "b" / "items.csv").read_bytes()


def test_the_history_says_more_than_popularity(dataset: Dataset) -> None:
    """Items of the last category read, most popular first, find far more than popular items do."""
    _, histories, targets = dataset.eval_samples("test")
    length = (histories >= 0).sum(axis=1)
    last = dataset.item_categories[histories[np.arange(len(histories)), length - 1]]
    same_category = dataset.item_categories[targets] == last
    popular = hits_at_k(Popularity.fit(dataset).top_k(histories, 50), targets, 50)
    assert same_category.mean() > 5 * popular.mean()
    assert 0 < popular.mean() < 0.2


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_items"):
        generate_user_behavior(tmp_path / "a.csv", num_items=100, num_categories=50)
