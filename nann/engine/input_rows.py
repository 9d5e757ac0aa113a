"""Which items an already embedded history is made of, told by a hash of each of its rows.

A row of `comm_seq` is the model's own input for one item (its embedding beside its category's) in half
precision. It brings no id, but the 16 bits of each of its numbers are those that the model has for the
item, so the hash of the row finds the item, and a walk can start from the user's own history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int32, UInt64

__all__ = ["InputRows", "hash_rows"]

_NEGATIVE_ZERO = 0x8000
_PADDING = 0  # the hash of a row of zeros


def hash_rows(rows: Float[np.ndarray, "n width"]) -> UInt64[np.ndarray, " n"]:
    """A 64-bit hash of each row, rounded to half precision; part of the artifact's format.

    With b_j the bits of number j as an unsigned integer (-0.0 as 0.0), the hash is the sum of m_j · b_j
    modulo 2^64, and so 0 for a row of zeros; m_j is the j-th output of SplitMix64 (Steele, Lea and Flood
    2014) from seed 0. In multilinear hashing (Carter and Wegman 1979) two rows collide with a chance of at
    most 2^-49, and of 2^-64 where one of the b_j differs by an odd number. A collision costs one start.
    """
    with np.errstate(over="ignore"):  # a number beyond half precision becomes infinite: no item's row
        halves = np.ascontiguousarray(rows, dtype=np.float16)
    bits = halves.view(np.uint16)
    bits = np.where(bits == _NEGATIVE_ZERO, np.uint16(0), bits).astype(np.uint64)
    return bits @ _multipliers(halves.shape[1])  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def _multipliers(width: int) -> UInt64[np.ndarray, " width"]:
    state = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    state.setflags(write=False)
    return state


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it holds arrays
class InputRows:
    """The hashes of every item's input row, ascending and without repeats, and whose they are.

    Of items with equal rows the model cannot tell one from another as a history; the first stands for
    them. An item whose row is all zeros looks like padding and has no entry.
    """

    hashes: UInt64[np.ndarray, " entries"]
    items: Int32[np.ndarray, " entries"]

    @classmethod
    def of(cls, hashes: UInt64[np.ndarray, " N"]) -> InputRows:
        """The table of `hash_rows` of every item, in the order of items."""
        unique, first = np.unique(hashes, return_index=True)
        kept = unique != _PADDING
        return cls(unique[kept], first[kept].astype(np.int32))

    def recognise(self, rows: Float[np.ndarray, "n width"]) -> tuple[Int32[np.ndarray, " known"], int]:
        """The items of the rows, in their order, and how many rows are of no item. Zero rows are padding."""
        hashes = hash_rows(rows)
        hashes = hashes[hashes != _PADDING]
        if not self.hashes.size:
            return np.empty(0, dtype=np.int32), hashes.size
        at = np.minimum(np.searchsorted(self.hashes, hashes), self.hashes.size - 1)
        known = at[self.hashes[at] == hashes]
        return self.items[known], hashes.size - known.size
