"""From a log of behaviours to the arrays of a prepared data set, by columns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from nann.offline.data import rules

if TYPE_CHECKING:
    from jaxtyping import Float32, Int8, Int32, Int64

    from nann.offline.data.interactions import Interactions

__all__ = ["Converted", "convert"]


@dataclass(frozen=True, slots=True)
class Converted:
    """The parts of a prepared data set; see `Dataset` for what each holds."""

    item_ids: pl.Series
    user_ids: pl.Series
    items: pl.DataFrame
    item_categories: Int32[np.ndarray, " items"]
    item_weights: Float32[np.ndarray, " items"]
    user_row_splits: Int64[np.ndarray, " users+1"]
    user_items: Int32[np.ndarray, " interactions"]
    user_split: Int8[np.ndarray, " users"]
    repeated_rows: int

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """What is stored as `.npy`, by name."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "item_categories": self.item_categories,
            "item_weights": self.item_weights,
            "user_row_splits": self.user_row_splits,
            "user_items": self.user_items,
            "user_split": self.user_split,
        }
        for name, ids in (("item_ids", self.item_ids), ("user_ids", self.user_ids)):
            if ids.dtype == pl.Int64:
                arrays[name] = ids.to_numpy()
        return arrays

    @property
    def id_types(self) -> dict[str, Literal["int", "str"]]:
        return {
            "item": "int" if self.item_ids.dtype == pl.Int64 else "str",
            "user": "int" if self.user_ids.dtype == pl.Int64 else "str",
        }

    def data_hash(self) -> str:
        """sha256 over the arrays and the ids, independent of file formats."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        for ids in (self.item_ids, self.user_ids):
            if ids.dtype == pl.String:
                digest.update(ids.str.len_bytes().cast(pl.Int64).to_numpy().tobytes())
                digest.update(ids.str.join("").item().encode())
        return digest.hexdigest()


def convert(log: Interactions, seed: int) -> Converted:
    """Number items and users in order of their ids, put each user's behaviours in time order, split users.

    Ties in time keep file order. The log must not be empty.
    """
    item_ids, items = _encode(log.items)
    user_ids, users = _encode(log.users)
    timestamps = log.timestamps.to_numpy()
    if not _is_ordered(users, timestamps):
        order = np.lexsort((timestamps, users))  # lexsort is stable
        users, items, timestamps = users[order], items[order], timestamps[order]
    repeated = (users[1:] == users[:-1]) & (items[1:] == items[:-1]) & (timestamps[1:] == timestamps[:-1])

    lengths = np.bincount(users, minlength=len(user_ids))
    counts = np.bincount(items, minlength=len(item_ids))
    item_table = _item_table(item_ids, log.item_attributes)
    return Converted(
        item_ids=item_ids,
        user_ids=user_ids,
        items=item_table,
        item_categories=_category_indices(item_table),
        item_weights=(counts / len(items)).astype(np.float32),
        user_row_splits=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        user_items=items,
        user_split=rules.split_users(lengths, seed),
        repeated_rows=int(repeated.sum()),
    )


def _encode(ids: pl.Series) -> tuple[pl.Series, Int32[np.ndarray, " rows"]]:
    """(Distinct ids ascending: integers numerically, strings by UTF-8 bytes; the row of each id in them)."""
    distinct = ids.unique().sort()
    if ids.dtype == pl.String:
        return distinct, ids.cast(pl.Enum(distinct)).to_physical().to_numpy().astype(np.int32)
    values, table = ids.to_numpy(), distinct.to_numpy()
    largest = int(table[-1])
    if largest < 4 * len(values) + 1_000_000:  # a table by id is ten times faster than bisection
        row_of_id = np.zeros(largest + 1, dtype=np.int32)
        row_of_id[table] = np.arange(len(table), dtype=np.int32)
        return distinct, row_of_id[values]
    return distinct, np.searchsorted(table, values).astype(np.int32)


def _is_ordered(users: Int32[np.ndarray, " rows"], timestamps: np.ndarray[Any, Any]) -> bool:
    later_user = users[1:] > users[:-1]
    same_user = users[1:] == users[:-1]
    return bool(np.all(later_user | (same_user & (timestamps[1:] >= timestamps[:-1]))))


def _item_table(item_ids: pl.Series, attributes: pl.DataFrame | None) -> pl.DataFrame:
    """One row an item, in item order: item_id, category, title first, then the other attributes."""
    table = pl.DataFrame({"item_id": item_ids})
    if attributes is None:
        return table
    known = attributes.with_columns(pl.col("item_id").cast(item_ids.dtype))
    joined = table.join(known, on="item_id", how="left", maintain_order="left")
    first = [name for name in ("item_id", "title", "category") if name in joined.columns]
    return joined.select(*first, pl.exclude(first))


def _category_indices(items: pl.DataFrame) -> Int32[np.ndarray, " items"]:
    """Categories as 1 .. C in ascending order; 0 where an item has none."""
    if "category" not in items.columns:
        return np.zeros(items.height, dtype=np.int32)
    rank = items["category"].rank("dense").cast(pl.Int64).fill_null(0)
    return rank.to_numpy().astype(np.int32)
