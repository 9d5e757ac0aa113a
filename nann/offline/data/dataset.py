"""A prepared data set, as everything after `nann prepare` reads it: memory mapped, decoded by columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from nann.offline.data import rules
from nann.offline.data.errors import NotPreparedError
from nann.offline.data.meta import DatasetMeta

if TYPE_CHECKING:
    from jaxtyping import Float32, Int8, Int32, Int64, Shaped

__all__ = ["Dataset", "EvalSplit"]

EvalSplit = Literal["validation", "test"]


@dataclass(frozen=True)
class Dataset:
    """Users' behaviours in time order, the items they touched, and the split of the users.

    Rows of items are in the order of their ids, rows of users too; `item_index` -1 means missing. Arrays
    are memory mapped and read-only. Only behaviours are stored: samples are decoded from them on demand.
    """

    directory: Path
    meta: DatasetMeta
    item_ids: Shaped[np.ndarray, " items"]
    item_categories: Int32[np.ndarray, " items"]
    item_weights: Float32[np.ndarray, " items"]
    user_ids: Shaped[np.ndarray, " users"]
    user_row_splits: Int64[np.ndarray, " users+1"]
    user_items: Int32[np.ndarray, " interactions"]
    user_split: Int8[np.ndarray, " users"]

    @classmethod
    def load(cls, directory: Path | str) -> Dataset:
        """Open the output of `nann prepare`.

        Raises NotPreparedError, naming the file, when a part is missing or of another shape than
        `meta.json` says.
        """
        directory = Path(directory)
        meta = DatasetMeta.read(directory)
        n_items, n_users = meta.num_items, meta.num_users
        return cls(
            directory=directory,
            meta=meta,
            item_ids=_load_ids(directory, "item", meta.id_type.item, n_items),
            item_categories=_load_array(directory, "item_categories", np.int32, n_items),
            item_weights=_load_array(directory, "item_weights", np.float32, n_items),
            user_ids=_load_ids(directory, "user", meta.id_type.user, n_users),
            user_row_splits=_load_array(directory, "user_row_splits", np.int64, n_users + 1),
            user_items=_load_array(directory, "user_items", np.int32, meta.num_interactions),
            user_split=_load_array(directory, "user_split", np.int8, n_users),
        )

    @property
    def num_items(self) -> int:
        return self.meta.num_items

    @property
    def num_categories(self) -> int:
        """Categories are 1 .. num_categories; 0 is missing."""
        return self.meta.num_categories

    @property
    def num_users(self) -> int:
        return self.meta.num_users

    @property
    def history_length(self) -> int:
        return self.meta.history_length

    @property
    def num_train_samples(self) -> int:
        """How many (history, target) pairs the training users give; sample indices are below it."""
        return int(self._train_sample_ends[-1]) if len(self._train_sample_ends) else 0

    @cached_property
    def user_lengths(self) -> Int64[np.ndarray, " users"]:
        """Behaviours of each user."""
        return np.diff(self.user_row_splits)

    @cached_property
    def items(self) -> pl.DataFrame:
        """`items.parquet`: item_id, category and every attribute, one row an item, in item order."""
        return pl.read_parquet(self.directory / "items.parquet")

    @cached_property
    def _train_users(self) -> Int64[np.ndarray, " train_users"]:
        has_samples = rules.train_sample_counts(self.user_lengths) > 0
        return np.flatnonzero((self.user_split == rules.TRAIN) & has_samples)

    @cached_property
    def _train_sample_ends(self) -> Int64[np.ndarray, " train_users"]:
        return np.cumsum(rules.train_sample_counts(self.user_lengths[self._train_users]))

    def users_of(self, split: rules.Split) -> Int64[np.ndarray, " users_of_split"]:
        """Rows of the users of a split, ascending."""
        return np.flatnonzero(self.user_split == rules.SPLIT_CODES[split])

    def eval_samples(
        self, split: EvalSplit
    ) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, "n length"], Int32[np.ndarray, " n"]]:
        """One sample a user of the split: (user rows, histories, held-out target items).

        Histories are oldest first and -1 padded at the end. The target is the behaviour
        `7 + floor((len - 7) / 2)` of its user (reference/nann.md).
        """
        users = self.users_of(split)
        position = rules.eval_position(self.user_lengths[users])
        histories, targets = self._samples_at(users, position)
        return users, histories, targets

    def train_positions(
        self, sample_index: Int64[np.ndarray, " batch"]
    ) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        """(user row, target position) of train samples; IndexError when one is out of range."""
        sample_index = np.asarray(sample_index, dtype=np.int64)
        if len(sample_index) and not 0 <= sample_index.min() <= sample_index.max() < self.num_train_samples:
            raise IndexError(f"train sample index outside 0 .. {self.num_train_samples - 1}")
        row = np.searchsorted(self._train_sample_ends, sample_index, side="right")
        users = self._train_users[row]
        first = self._train_sample_ends[row] - rules.train_sample_counts(self.user_lengths[users])
        return users, rules.FIRST_TRAIN_POSITION + sample_index - first

    def train_samples(
        self, sample_index: Int64[np.ndarray, " batch"]
    ) -> tuple[Int32[np.ndarray, "batch length"], Int32[np.ndarray, " batch"]]:
        """(histories, target items) of train samples, 0 <= sample_index < `num_train_samples`."""
        return self._samples_at(*self.train_positions(sample_index))

    def _samples_at(
        self, users: Int64[np.ndarray, " batch"], position: Int64[np.ndarray, " batch"]
    ) -> tuple[Int32[np.ndarray, "batch length"], Int32[np.ndarray, " batch"]]:
        start = self.user_row_splits[users]
        histories = rules.histories_before(self.user_items, start, position, self.history_length)
        return histories, np.asarray(self.user_items[start + position])

    def popular_items(self, k: int) -> Int32[np.ndarray, " k"]:
        """The k items with the most behaviours, most popular first, ties by item index."""
        return np.argsort(-self.item_weights, kind="stable")[:k].astype(np.int32)

    def recent_histories(
        self, limit: int
    ) -> tuple[Int64[np.ndarray, " users+1"], Int32[np.ndarray, " kept"]]:
        """The newest `limit` items of every user, oldest first, as (row splits, items)."""
        lengths = self.user_lengths
        kept = np.minimum(lengths, limit)
        row_splits = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        shift = self.user_row_splits[1:] - row_splits[1:]  # rows end where the user's behaviours end
        source = np.arange(row_splits[-1]) + np.repeat(shift, kept)
        return row_splits, np.asarray(self.user_items[source])


def _load_array(directory: Path, name: str, dtype: type[np.generic], length: int) -> np.ndarray[Any, Any]:
    path = directory / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise NotPreparedError(f"{path}: cannot be read ({error}); run nann prepare again") from error
    if array.dtype != dtype or array.shape != (length,):
        raise NotPreparedError(
            f"{path}: expected {np.dtype(dtype).name} [{length}], found {array.dtype} {list(array.shape)}; "
            "run nann prepare again"
        )
    return np.asarray(array)


def _load_ids(directory: Path, kind: str, id_type: str, length: int) -> np.ndarray[Any, Any]:
    """Integer ids as int64, string ids as an object array of `str`."""
    if id_type == "int":
        return _load_array(directory, f"{kind}_ids", np.int64, length)
    path = directory / f"{kind}_ids.parquet"
    try:
        ids = pl.read_parquet(path, columns=[f"{kind}_id"]).to_series()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise NotPreparedError(f"{path}: cannot be read ({error}); run nann prepare again") from error
    if len(ids) != length or ids.dtype != pl.String:
        raise NotPreparedError(f"{path}: expected {length} strings, found {len(ids)} of {ids.dtype}")
    return np.array(ids.to_list(), dtype=object)
