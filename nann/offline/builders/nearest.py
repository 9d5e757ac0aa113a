"""Level 0 from nearest neighbours as they are: each item's nearest items, and those it is nearest to.

HNSW drops a neighbour that lies near a nearer one. A greedy walk towards one vector needs the long links
this leaves; a walk that wants the best 200 of a region, and starts inside it, needs the near ones that it
drops: on Brunch it scores half as many items for the same recall (docs/research/search.md, "Graphs").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["join", "nearest_lists", "reverse_lists"]

# Nodes that faiss keeps while it looks for the nearest ones; more finds the last per cent of them.
_EF_SEARCH = 64


def nearest_lists(
    index: Any, vectors: Float32[np.ndarray, "N D"], count: int, *, num_threads: int | None = None
) -> Int32[np.ndarray, "N count"]:
    """The `count` nearest other items of each item, nearest first, as faiss' `index` over `vectors` finds
    them; padded with -1 at the end of a row."""
    import faiss

    threads_before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads or threads_before)
    index.hnsw.efSearch = max(_EF_SEARCH, 2 * count)
    try:
        _, found = index.search(vectors, min(count + 1, len(vectors)))
    finally:
        faiss.omp_set_num_threads(threads_before)
    lists = np.full((len(vectors), count), -1, dtype=np.int32)
    _without_self(found, lists)
    return lists


@numba.njit(cache=True)
def _without_self(found: np.ndarray, out: Int32[np.ndarray, "N count"]) -> None:
    for item in range(len(found)):
        n = 0
        for other in found[item]:
            if other >= 0 and other != item and n < out.shape[1]:
                out[item, n] = other
                n += 1


@numba.njit(cache=True)
def reverse_lists(lists: Int32[np.ndarray, "N count"], limit: int) -> Int32[np.ndarray, "N limit"]:
    """The items whose list an item is on, at most `limit`: those that have it nearest first."""
    out = np.full((len(lists), limit), -1, dtype=np.int32)
    n = np.zeros(len(lists), dtype=np.int32)
    for place in range(lists.shape[1]):
        for item in range(len(lists)):
            other = lists[item, place]
            if other >= 0 and n[other] < limit:
                out[other, n[other]] = item
                n[other] += 1
    return out


@numba.njit(cache=True)
def join(
    first: Int32[np.ndarray, "N a"], second: Int32[np.ndarray, "N b"], degree: int
) -> Int32[np.ndarray, "N degree"]:
    """The rows of `first`, then what `second` has beside them, cut to `degree`; no item twice in a row."""
    out = np.full((len(first), degree), -1, dtype=np.int32)
    for item in range(len(first)):
        n = 0
        for table in (first, second):
            for other in table[item]:
                if other < 0 or other == item or n == degree:
                    continue
                known = False
                for j in range(n):
                    known = known or out[item, j] == other
                if not known:
                    out[item, n] = other
                    n += 1
    return out
