"""A small prepared data set with planted interests, written as `nann prepare` writes one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nann.offline.data import rules
from nann.offline.data.meta import DatasetMeta, IdTypes, SourceMeta, SplitSizes

N_TASTES = 10


def _write(
    directory: Path, *, n_users: int = 120, n_items: int = 60, length: int = 24, seed: int = 0
) -> Path:
    """Every user likes the items of one taste: item index modulo N_TASTES."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    taste = rng.integers(0, N_TASTES, n_users)
    liked = rng.integers(0, n_items // N_TASTES, (n_users, length)) * N_TASTES + taste[:, None]
    user_items = liked.astype(np.int32).ravel()
    lengths = np.full(n_users, length, np.int64)
    split = rules.split_users(lengths, seed)
    categories = (np.arange(n_items) % N_TASTES + 1).astype(np.int32)
    weights = (np.bincount(user_items, minlength=n_items) / len(user_items)).astype(np.float32)
    item_ids = np.arange(1000, 1000 + n_items, dtype=np.int64)
    arrays: dict[str, np.ndarray] = {
        "item_ids": item_ids,
        "item_categories": categories,
        "item_weights": weights,
        "user_ids": np.arange(n_users, dtype=np.int64),
        "user_row_splits": np.concatenate([[0], np.cumsum(lengths)]),
        "user_items": user_items,
        "user_split": split,
    }
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    pl.DataFrame({"item_id": item_ids, "category": categories}).write_parquet(directory / "items.parquet")
    counts = {code: int((split == code).sum()) for code in (rules.TRAIN, rules.VALIDATION, rules.TEST)}
    DatasetMeta(
        id_type=IdTypes(item="int", user="int"),
        num_items=n_items,
        num_categories=N_TASTES,
        num_users=n_users,
        num_interactions=len(user_items),
        num_eligible_users=n_users,
        num_train_samples=int(rules.train_sample_counts(lengths[split == rules.TRAIN]).sum()),
        history_length=rules.HISTORY_LENGTH,
        min_behaviours=rules.MIN_BEHAVIOURS,
        seed=seed,
        splits=SplitSizes(
            train=counts[rules.TRAIN],
            validation=counts[rules.VALIDATION],
            test=counts[rules.TEST],
            ineligible=0,
        ),
        attribute_columns=["category"],
        source=SourceMeta(format="synthetic", files=[], rows_read=0, bad_rows=0, repeated_rows=0),
        data_hash=hashlib.sha256(user_items.tobytes()).hexdigest(),
    ).write(directory)
    return directory


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """Writes a data set of the given sizes into a directory and returns that directory."""
    return _write


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """60 items, 120 users, 10 tastes that both histories and targets follow."""
    return _write(tmp_path / "data")
