from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nann.offline.data.dataset import Dataset
from nann.offline.data.errors import NotPreparedError
from nann.offline.data.prepare import prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 users with 5 to 80 behaviours over 40 items."""
    directory = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 80, 60)
    n = int(lengths.sum())
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(60) * 3 + 5, lengths),
            "item_id": rng.integers(0, 40, n) * 7 + 1,
            "timestamp": rng.integers(0, 50, n),
        }
    )
    log.write_csv(directory / "log.csv")
    prepare(directory / "log.csv", directory / "data")
    return Dataset.load(directory / "data")


def test_every_train_sample_equals_the_one_cut_by_hand(dataset: Dataset) -> None:
    expected = []
    for user in dataset.users_of("train"):
        row = dataset.user_items[dataset.user_row_splits[user] : dataset.user_row_splits[user + 1]].tolist()
        for position in range(10, len(row) - 1):
            history = row[max(0, position - 50) : position]
            expected.append((history + [-1] * (50 - len(history)), row[position]))
    assert dataset.num_train_samples == dataset.meta.num_train_samples == len(expected)
    order = np.random.default_rng(0).permutation(len(expected))
    histories, targets = dataset.train_samples(order)
    assert histories.tolist() == [expected[i][0] for i in order]
    assert targets.tolist() == [expected[i][1] for i in order]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_evaluation_sample_a_user(dataset: Dataset, split: str) -> None:
    users, histories, targets = dataset.eval_samples(split)  # type: ignore[arg-type]
    assert len(users) == len(histories) == len(targets) > 0
    for user, history, target in zip(users, histories, targets, strict=True):
        row = dataset.user_items[dataset.user_row_splits[user] : dataset.user_row_splits[user + 1]].tolist()
        position = 7 + (len(row) - 7) // 2
        before = row[max(0, position - 50) : position]
        assert history.tolist() == before + [-1] * (50 - len(before))
        assert target == row[position]


def test_splits_share_no_user(dataset: Dataset) -> None:
    rows = [set(dataset.users_of(split).tolist()) for split in ("train", "validation", "test")]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    assert sum(map(len, rows)) == dataset.meta.num_eligible_users


@pytest.mark.parametrize("index", [-1, None])
def test_a_train_sample_out_of_range_is_refused(dataset: Dataset, index: int | None) -> None:
    with pytest.raises(IndexError, match="outside 0"):
        dataset.train_samples(np.array([dataset.num_train_samples if index is None else index]))


def test_no_samples_asked_for_is_no_error(dataset: Dataset) -> None:
    histories, targets = dataset.train_samples(np.empty(0, np.int64))
    assert histories.shape == (0, 50)
    assert targets.shape == (0,)


def test_popular_items_are_ordered_by_count_then_index(dataset: Dataset) -> None:
    counts = np.bincount(dataset.user_items, minlength=dataset.num_items)
    expected = sorted(range(dataset.num_items), key=lambda i: (-counts[i], i))[:10]
    assert dataset.popular_items(10).tolist() == expected
    assert np.isclose(dataset.item_weights.sum(), 1.0)


def test_recent_histories_keep_the_newest(dataset: Dataset) -> None:
    row_splits, items = dataset.recent_histories(20)
    for user in range(dataset.num_users):
        row = dataset.user_items[dataset.user_row_splits[user] : dataset.user_row_splits[user + 1]]
        assert items[row_splits[user] : row_splits[user + 1]].tolist() == row[-20:].tolist()


def test_arrays_are_mapped_and_cannot_be_written(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="read-only"):
        dataset.user_items[0] = 1


def test_a_directory_that_is_not_prepared_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotPreparedError, match="nann prepare --input"):
        Dataset.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "other shape", "meta", "version"])
def test_a_damaged_data_set_names_the_file(dataset: Dataset, tmp_path: Path, damage: str) -> None:
    for file in dataset.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, meta = tmp_path / "item_weights.npy", tmp_path / "meta.json"
    match damage:
        case "missing":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "other shape":
            np.save(weights, np.zeros(3, np.float32))
        case "meta":
            meta.write_text("{}")
        case "version":
            meta.write_text(meta.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(
        NotPreparedError, match="meta.json" if damage in ("meta", "version") else "item_weights"
    ):
        Dataset.load(tmp_path)
