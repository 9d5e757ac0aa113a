"""String ids of an artifact as one block of UTF-8: no Python object an id, and a look-up that builds nothing.

For four million ids a list and a dictionary took 14 seconds and 0.6 GB; the block is there in half a second
and takes the strings' own bytes and eight more an id (docs/growth.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numba
import numpy as np

if TYPE_CHECKING:
    import polars as pl
    from jaxtyping import Int32, Int64, UInt8

__all__ = ["StringIds"]

_NO_UTF8 = b"\xff"  # stands for what is no string: no id has this byte


class StringIds(Sequence[str]):
    """Unique strings in ascending order of their UTF-8 bytes; position = item index."""

    def __init__(self, ids: Sequence[str] | pl.Series) -> None:
        """Raises ValueError when the ids are not unique and ascending."""
        import polars as pl

        series = ids if isinstance(ids, pl.Series) else pl.Series(ids, dtype=pl.String)
        # Polars compares strings by their bytes.
        if not (series.slice(1) > series.slice(0, max(series.len() - 1, 0))).all():
            raise ValueError("ids are unique and in ascending order")
        self._offsets: Int64[np.ndarray, " n+1"] = _offsets(series.str.len_bytes().to_numpy())
        self._text: bytes = "".join(series.str.join("")).encode()
        self._bytes: UInt8[np.ndarray, " bytes"] = np.frombuffer(self._text, np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.take(np.array([index % len(self)]))[0]

    def take(self, positions: Any) -> list[str]:
        """The ids at these positions, an integer array. IndexError for a position past the last."""
        starts, stops = self._offsets[positions].tolist(), self._offsets[positions + 1].tolist()
        return [self._text[start:stop].decode() for start, stop in zip(starts, stops, strict=True)]

    def find(self, ids: Sequence[Any]) -> Int32[np.ndarray, " n"]:
        """The position of each id, -1 for one that is unknown or no string."""
        # A lone surrogate has no UTF-8; as bytes it is like no id.
        wanted = [
            name.encode("utf-8", "surrogatepass") if isinstance(name, str) else _NO_UTF8 for name in ids
        ]
        found = np.empty(len(wanted), dtype=np.int32)
        text = np.frombuffer(b"".join(wanted), np.uint8)
        _find(self._bytes, self._offsets, text, _offsets(np.array([*map(len, wanted)], np.int64)), found)
        return found


def _offsets(lengths: np.ndarray) -> Int64[np.ndarray, " n+1"]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find(
    text: np.ndarray, offsets: np.ndarray, wanted: np.ndarray, wanted_offsets: np.ndarray, found: np.ndarray
) -> None:
    """A binary search for each wanted string; `found[i]` = its position or -1."""
    for i in range(found.size):
        start, stop = wanted_offsets[i], wanted_offsets[i + 1]
        low, high = 0, offsets.size - 1
        while low < high:
            middle = (low + high) // 2
            if _order(text, offsets[middle], offsets[middle + 1], wanted, start, stop) < 0:
                low = middle + 1
            else:
                high = middle
        there = low < offsets.size - 1
        if there and _order(text, offsets[low], offsets[low + 1], wanted, start, stop) != 0:
            there = False
        found[i] = low if there else -1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _order(
    left: np.ndarray, left_start: int, left_stop: int, right: np.ndarray, right_start: int, right_stop: int
) -> int:
    """Negative, zero or positive, as the left string comes before, is or comes after the right one."""
    left_length, right_length = left_stop - left_start, right_stop - right_start
    for i in range(min(left_length, right_length)):
        a, b = left[left_start + i], right[right_start + i]
        if a != b:
            return -1 if a < b else 1
    return left_length - right_length
