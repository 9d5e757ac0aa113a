"""Item ids, user histories and attributes of one artifact: everything that turns ids into rows and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from nann.engine.errors import ArtifactError
from nann.engine.string_ids import StringIds
from nann.engine.types import ItemId, UserId

if TYPE_CHECKING:
    import polars as pl
    from jaxtyping import Bool, Int32, Int64

    from nann.engine.artifacts import Artifact

__all__ = ["Catalog"]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def _find(ids: Int64[np.ndarray, " n"] | StringIds, wanted: Sequence[ItemId]) -> Int32[np.ndarray, " found"]:
    """The position of each id among ascending `ids`, -1 for an unknown one and for one of the other type."""
    if isinstance(ids, StringIds):
        return ids.find(wanted)
    if not ids.size:
        return np.full(len(wanted), -1, dtype=np.int32)
    numbers, possible = _as_int64(wanted)
    found: Int32[np.ndarray, " found"] = _positions(ids, numbers)
    if possible is not None:
        found[~possible] = -1
    return found


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _positions(ids: Int64[np.ndarray, " n"], wanted: Int64[np.ndarray, " k"]) -> Int32[np.ndarray, " k"]:
    """The position of each among ascending `ids`, -1 for one that is not there.

    A search of a large array waits for memory at every halving. All of them halve together, so that
    their waits overlap: 50 ids of 226,000 in half of the time when the caches hold none of it.
    """
    at = np.zeros(wanted.size, dtype=np.int32)
    left = ids.size
    while left > 1:
        half = left // 2
        for i in range(wanted.size):
            if ids[at[i] + half] <= wanted[i]:
                at[i] += half
        left -= half
    for i in range(wanted.size):
        if ids[at[i]] != wanted[i]:
            at[i] = -1
    return at


def _plain(ids: Int64[np.ndarray, " n"] | StringIds) -> Int64[np.ndarray, " n"] | StringIds:
    """A plain view: indexing a mapped array costs microseconds more."""
    return ids if isinstance(ids, StringIds) else np.asarray(ids)


def _as_int64(ids: Sequence[ItemId]) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"] | None]:
    """The ids, and which of them can be integer ids (None: all); bool is an int in Python, but no id."""
    if set(map(type, ids)) <= {int}:
        try:
            return np.array(ids, dtype=np.int64), None
        except OverflowError:
            pass
    possible = [type(name) is int and _INT64_MIN <= name <= _INT64_MAX for name in ids]
    numbers = [i if ok else 0 for i, ok in zip(ids, possible, strict=True)]
    return np.array(numbers, dtype=np.int64), np.array(possible, dtype=np.bool_)


class Catalog:
    """Names of one artifact's items and users, and what is known of them."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._items = _plain(artifact.item_ids)
        self._users = _plain(artifact.history_ids)

    def item_index(self, item_ids: Sequence[ItemId]) -> Int32[np.ndarray, " n"]:
        """Row of each item id, -1 where unknown."""
        return _find(self._items, item_ids) if len(item_ids) else np.empty(0, dtype=np.int32)

    def item_ids(self, item_index: Int32[np.ndarray, " n"]) -> list[ItemId]:
        ids = self._items
        found: list[Any] = ids.take(item_index) if isinstance(ids, StringIds) else ids[item_index].tolist()
        return found

    def user_history(self, user_id: UserId) -> tuple[ItemId, ...] | None:
        """The items of a user at training time, oldest first; None for a user not in the artifact.

        Raises:
            ArtifactError: an item of the history is none, which ``--verify fast`` does not look for.
        """
        row = int(_find(self._users, [user_id])[0])
        if row < 0:
            return None
        splits = self._artifact.history_row_splits
        items = self._artifact.history_items[splits[row] : splits[row + 1]]
        n = self._artifact.num_items
        if items.size and not 0 <= items.min() <= items.max() < n:
            path = self._artifact.directory / "arrays" / "history_items.npy"
            raise ArtifactError(
                str(path), expected=f"item indices from 0 to {n - 1}", found=f"{items.min()} to {items.max()}"
            )
        return tuple(self.item_ids(items))

    @cached_property
    def by_popularity(self) -> Int32[np.ndarray, " N"]:
        """Every item, most popular first; equal shares by item index."""
        return np.argsort(-self._artifact.item_weights, kind="stable").astype(np.int32)

    @cached_property
    def table(self) -> pl.DataFrame | None:
        """``items.parquet`` in item order, or None when the artifact has none.

        Raises:
            ArtifactError: it cannot be read, or has another number of rows.
        """
        path = self._artifact.items_parquet
        if path is None:
            return None
        import polars as pl

        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(str(path), expected="a Parquet file", found=str(error)) from error
        if table.height != self._artifact.num_items:
            raise ArtifactError(
                str(path), expected=f"{self._artifact.num_items} rows", found=f"{table.height} rows"
            )
        return table.drop("item_id", strict=False)

    def attributes(self, item_index: Int32[np.ndarray, " n"]) -> list[Mapping[str, Any]]:
        """What is known of each item by column name, without the columns that are null for it."""
        if self.table is None or not self.table.width:
            return [{} for _ in item_index]
        rows = self.table[item_index.tolist()].to_dicts()
        return [{name: value for name, value in row.items() if value is not None} for row in rows]
