"""The graph's inner loops, compiled by numba; the parallel ones use all processors, all release the GIL."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["choose_all", "join_all", "link_unreached", "reverse", "spread"]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _distance(vectors: np.ndarray, a: int, b: int) -> np.float32:
    total = np.float32(0.0)
    for d in range(vectors.shape[1]):
        difference = vectors[a, d] - vectors[b, d]
        total += difference * difference
    return total


@numba.njit(cache=True, nogil=True)
def _choose(vectors: np.ndarray, ids: np.ndarray, distances: np.ndarray, count: int, row: np.ndarray) -> None:
    """Fill `row` from the first `count` of `ids`: diverse ones first, then the nearest of the rest."""
    order = np.argsort(distances[:count])
    taken = np.zeros(count, dtype=np.bool_)
    kept = 0
    for position in order:
        if kept == row.size:
            return
        diverse = True
        for other in range(kept):
            if _distance(vectors, row[other], ids[position]) < distances[position]:
                diverse = False
                break
        if diverse:
            row[kept] = ids[position]
            taken[position] = True
            kept += 1
    for position in order:
        if kept == row.size:
            return
        if not taken[position]:
            row[kept] = ids[position]
            kept += 1


@numba.njit(cache=True, nogil=True, parallel=True)
def choose_all(vectors: np.ndarray, near: np.ndarray, out: np.ndarray) -> None:
    """Fill row i of `out` from row i of `near`."""
    for item in numba.prange(len(near)):
        distances = np.empty(near.shape[1], dtype=np.float32)
        ids = np.empty(near.shape[1], dtype=np.int32)
        count = 0
        for other in near[item]:
            if other >= 0:
                ids[count] = other
                distances[count] = _distance(vectors, item, other)
                count += 1
        _choose(vectors, ids, distances, count, out[item])


@numba.njit(cache=True, nogil=True)
def reverse(forward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each item the items that point at it: sources[starts[i] : starts[i + 1]], ascending."""
    starts = np.zeros(len(forward) + 1, dtype=np.int64)
    for row in forward:
        for other in row:
            if other >= 0:
                starts[other + 1] += 1
    starts = np.cumsum(starts)
    sources = np.empty(starts[-1], dtype=np.int32)
    end = starts[:-1].copy()
    for item in range(len(forward)):
        for other in forward[item]:
            if other >= 0:
                sources[end[other]] = item
                end[other] += 1
    return starts, sources


@numba.njit(cache=True, nogil=True, parallel=True)
def join_all(
    vectors: np.ndarray, forward: np.ndarray, starts: np.ndarray, sources: np.ndarray, out: np.ndarray
) -> None:
    """Fill row i of `out` from the edges of item i and those that lead to it (`reverse`)."""
    for item in numba.prange(len(forward)):
        both = np.concatenate((forward[item], sources[starts[item] : starts[item + 1]]))
        ids = np.unique(both[both >= 0])
        distances = np.empty(ids.size, dtype=np.float32)
        for position in range(ids.size):
            distances[position] = _distance(vectors, item, ids[position])
        _choose(vectors, ids, distances, ids.size, out[item])


@numba.njit(cache=True, nogil=True)
def spread(table: np.ndarray, roots: np.ndarray, reached: np.ndarray) -> None:
    """Mark `roots` and all that a path leads to from them as reached."""
    stack = np.empty(len(table), dtype=np.int64)
    size = 0
    for root in roots:
        if not reached[root]:
            reached[root] = True
            stack[size] = root
            size += 1
    while size:
        size -= 1
        for other in table[stack[size]]:
            if other >= 0 and not reached[other]:
                reached[other] = True
                stack[size] = other
                size += 1


@numba.njit(cache=True, nogil=True)
def link_unreached(table: np.ndarray, near: np.ndarray, reached: np.ndarray) -> None:
    """Point a slot of the nearest reached neighbour of each unreached item at it.

    A padding slot, or else one from the end of the row, where the edges are that mattered least; of any
    row at most half the slots, each once.
    """
    degree = table.shape[1]
    free = np.full(len(table), degree, dtype=np.int64)
    for item in range(len(table)):
        if reached[item]:
            continue
        for other in near[item]:
            if other < 0 or not reached[other] or free[other] <= degree // 2:
                continue
            slot = 0
            while slot < degree and table[other, slot] >= 0:
                slot += 1
            if slot == degree:
                free[other] -= 1
                slot = free[other]
            table[other, slot] = item
            reached[item] = True  # and others may now be linked from it
            break
