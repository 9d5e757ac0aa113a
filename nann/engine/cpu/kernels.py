"""The CPU backend's inner loops, compiled by numba. Each is a plain loop over queries and releases the GIL.

Keys: ``pack`` maps (score, item_index) to an unsigned 64-bit integer so that a smaller key ranks
first: the upper half is the score's bit pattern made monotone and inverted (IEEE 754 floats order
like sign-magnitude integers), the lower half the item index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from nann.engine.cpu.prefetch import prefetch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32, Int64, UInt, UInt8, UInt64

__all__ = [
    "admit",
    "advance",
    "expand",
    "expand_one",
    "forget",
    "gather_rows",
    "is_set",
    "key_of",
    "merge",
    "pack",
    "score_of",
    "seed",
    "select",
    "test_and_set",
    "unit_inner_products",
    "unpack",
]

_SIGN = np.uint32(0x80000000)
_ALL = np.uint32(0xFFFFFFFF)
_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_6 = np.uint64(6)
_63 = np.uint64(63)
_1 = np.uint64(1)
_CACHE_LINE_BYTES = 64
# Rows to ask for ahead of their use: enough to cover a memory access, few enough to stay in cache.
_ROWS_AHEAD = 8


def pack(scores: Float32[np.ndarray, " n"], item_index: Int32[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Keys of finite ``scores``; ascending keys = score descending, then item_index ascending."""
    bits = (scores.astype(np.float32) + np.float32(0.0)).view(np.uint32)  # + 0.0 makes -0.0 equal 0.0
    monotone = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return ((_ALL - monotone).astype(np.uint64) << _32) | item_index.astype(np.uint64)


@numba.njit(nogil=True, cache=True)
def unpack(
    keys: UInt64[np.ndarray, " n"],
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """The item indices and scores of ``keys``: the inverse of `pack`."""
    item_index = np.empty(keys.size, dtype=np.int32)
    bits = np.empty(keys.size, dtype=np.uint32)
    for j in range(keys.size):
        monotone = _ALL - np.uint32(keys[j] >> _32)
        bits[j] = (monotone & ~_SIGN) if monotone & _SIGN else ~monotone
        item_index[j] = np.int32(keys[j] & _LOW32)
    return item_index, bits.view(np.float32)


@numba.njit(nogil=True, cache=True)
def score_of(key: np.uint64) -> np.float32:
    """The score in one key of `pack`."""
    monotone = _ALL - np.uint32(key >> _32)
    bits = (monotone & ~_SIGN) if monotone & _SIGN else ~monotone
    return np.uint32(bits).view(np.float32)


@numba.njit(nogil=True, cache=True)
def key_of(score: np.float32, item: int) -> np.uint64:
    """`pack` of one finite score."""
    bits = np.float32(score + np.float32(0.0)).view(np.uint32)  # + 0.0 makes -0.0 equal 0.0
    monotone = (_ALL ^ bits) if bits & _SIGN else (bits | _SIGN)
    return (np.uint64(_ALL - monotone) << _32) | np.uint64(item)


@numba.njit(nogil=True, cache=True)
def test_and_set(bitmap: UInt64[np.ndarray, " words"], index: int) -> bool:
    word = np.uint64(index) >> _6
    bit = _1 << (np.uint64(index) & _63)
    if bitmap[word] & bit:
        return True
    bitmap[word] |= bit
    return False


@numba.njit(nogil=True, cache=True)
def is_set(bitmap: UInt64[np.ndarray, " words"], index: int) -> bool:
    return bool(bitmap[np.uint64(index) >> _6] & (_1 << (np.uint64(index) & _63)))


@numba.njit(nogil=True, cache=True)
def seed(
    visited: UInt64[np.ndarray, "batch words"],
    rows: Int32[np.ndarray, " total"],
    splits: Int32[np.ndarray, " batch+1"],
    out: Int32[np.ndarray, " capacity"],
    out_splits: Int32[np.ndarray, " batch+1"],
) -> None:
    """Visit the given rows; keep the first sight of each."""
    n = 0
    out_splits[0] = 0
    for b in range(splits.size - 1):
        for j in range(splits[b], splits[b + 1]):
            if rows[j] >= 0 and not test_and_set(visited[b], rows[j]):
                out[n] = rows[j]
                n += 1
        out_splits[b + 1] = n


@numba.njit(nogil=True, cache=True)
def expand_one(
    visited: UInt64[np.ndarray, " words"],
    neighbors: Int32[np.ndarray, "N degree"],
    frontier: Int32[np.ndarray, " count"],
    out: Int32[np.ndarray, " capacity"],
) -> int:
    """`expand` for one query; returns how many neighbours it wrote."""
    n = 0
    line = _CACHE_LINE_BYTES // neighbors.itemsize
    for j in range(-_ROWS_AHEAD, frontier.size):
        if j + _ROWS_AHEAD < frontier.size:
            for column in range(0, neighbors.shape[1], line):
                prefetch(neighbors, np.int64(frontier[j + _ROWS_AHEAD]), column)
        if j < 0:
            continue
        for item in neighbors[frontier[j]]:
            if item < 0:  # rows are padded at their end
                break
            if not test_and_set(visited, item):
                out[n] = item
                n += 1
    return n


@numba.njit(nogil=True, cache=True)
def expand(
    visited: UInt64[np.ndarray, "batch words"],
    neighbors: Int32[np.ndarray, "N degree"],
    frontier: Int32[np.ndarray, "batch width"],
    count: Int32[np.ndarray, " batch"],
    out: Int32[np.ndarray, " capacity"],
    out_splits: Int32[np.ndarray, " batch+1"],
) -> None:
    """Unvisited neighbours of each query's frontier, in frontier then neighbour order, visited now."""
    out_splits[0] = 0
    for b in range(count.size):
        n = out_splits[b]
        out_splits[b + 1] = n + expand_one(visited[b], neighbors, frontier[b, : count[b]], out[n:])


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def unit_inner_products(
    vectors: Float32[np.ndarray, "N dim"],
    query: Float32[np.ndarray, " dim"],
    out: Float32[np.ndarray, " N"],
) -> None:
    """``out = (vectors / norms) @ query``, 0 for a zero vector.

    The loop waits for memory, so the norms cost it nothing. A sum's order is this loop's, so a product
    does not depend on who else asks.
    """
    for item in range(vectors.shape[0]):
        product = np.float32(0.0)
        square = np.float32(0.0)
        for d in range(query.size):
            product += vectors[item, d] * query[d]
            square += vectors[item, d] * vectors[item, d]
        out[item] = product / np.sqrt(square) if square > 0 else np.float32(0.0)


@numba.njit(nogil=True, cache=True)
def forget(
    visited: UInt64[np.ndarray, "batch words"],
    keys: UInt64[np.ndarray, "batch capacity"],
    expanded: UInt8[np.ndarray, "batch capacity"],
    size: Int32[np.ndarray, " batch"],
) -> None:
    """Only the pool counts as visited, and none of it as expanded."""
    for b in range(size.size):
        visited[b, :] = np.uint64(0)
        for j in range(size[b]):
            test_and_set(visited[b], np.int64(keys[b, j] & _LOW32))
            expanded[b, j] = 0


@numba.njit(nogil=True, cache=True)
def _collect(
    scores: Float32[np.ndarray, " n"],
    item_index: Int32[np.ndarray, " n"],
    allowed: Bool[np.ndarray, " n"],
    worst: np.uint64,
    out: UInt64[np.ndarray, " n"],
) -> tuple[int, int]:
    """Keys below ``worst`` of finite, allowed scores; returns how many, and how many were not finite."""
    n = 0
    nonfinite = 0
    for j in range(scores.size):
        if not np.isfinite(scores[j]):
            nonfinite += 1
            continue
        if allowed.size and not allowed[j]:
            continue
        key = key_of(scores[j], item_index[j])
        if key < worst:
            out[n] = key
            n += 1
    return n, nonfinite


@numba.njit(nogil=True, cache=True)
def merge(
    keys: UInt64[np.ndarray, "batch allocated"],
    expanded: UInt8[np.ndarray, "batch allocated"],
    size: Int32[np.ndarray, " batch"],
    item_index: Int32[np.ndarray, " total"],
    row_splits: Int32[np.ndarray, " batch+1"],
    scores: Float32[np.ndarray, " total"],
    allowed: Bool[np.ndarray, " total_or_0"],
    keep: int,
    capacity: int,
    nonfinite: Int64[np.ndarray, " batch"],
    new_keys: UInt64[np.ndarray, " scratch"],
    old_keys: UInt64[np.ndarray, " allocated"],
    old_expanded: UInt8[np.ndarray, " allocated"],
) -> None:
    """Per query: pool = the best ``capacity`` of pool ∪ (the best ``keep`` allowed new ones).

    ``allowed`` of size 0 allows all. Node identity needs no check: a candidate is new by construction.
    """
    for b in range(size.size):
        start, stop = row_splits[b], row_splits[b + 1]
        size[b] = min(size[b], capacity)  # `level` may narrow the pool from one stage to the next
        if start == stop:
            continue
        worst = keys[b, capacity - 1] if size[b] >= capacity else ~np.uint64(0)
        found, bad = _collect(
            scores[start:stop],
            item_index[start:stop],
            allowed[start:stop] if allowed.size else allowed,
            worst,
            new_keys,
        )
        nonfinite[b] += bad
        if found == 0:
            continue
        fresh = new_keys[:found]
        fresh.sort()
        found = min(found, keep)
        n_old = size[b]
        old_keys[:n_old] = keys[b, :n_old]
        old_expanded[:n_old] = expanded[b, :n_old]
        total = min(capacity, n_old + found)
        i = j = 0
        for o in range(total):
            if j >= found or (i < n_old and old_keys[i] < fresh[j]):
                keys[b, o] = old_keys[i]
                expanded[b, o] = old_expanded[i]
                i += 1
            else:
                keys[b, o] = fresh[j]
                expanded[b, o] = 0
                j += 1
        size[b] = total


@numba.njit(nogil=True, cache=True)
def select(
    keys: UInt64[np.ndarray, "batch allocated"],
    expanded: UInt8[np.ndarray, "batch allocated"],
    size: Int32[np.ndarray, " batch"],
    width: int,
    frontier: Int32[np.ndarray, "batch width"],
    frontier_score: Float32[np.ndarray, "batch width"],
    count: Int32[np.ndarray, " batch"],
) -> None:
    """The ``width`` best nodes of each pool not expanded yet and their scores, marked as expanded."""
    for b in range(size.size):
        n = 0
        for j in range(size[b]):
            if n == width:
                break
            if not expanded[b, j]:
                expanded[b, j] = 1
                frontier[b, n] = np.int32(keys[b, j] & _LOW32)
                frontier_score[b, n] = score_of(keys[b, j])
                n += 1
        count[b] = n


@numba.njit(nogil=True, cache=True)
def admit(
    item_index: Int32[np.ndarray, " total"],
    row_splits: Int32[np.ndarray, " batch+1"],
    excluded: Int32[np.ndarray, " n_excluded"],
    excluded_splits: Int32[np.ndarray, " batch+1"],
    out: Bool[np.ndarray, " total"],
) -> None:
    """Whether each candidate is not among its query's ``excluded`` items (ascending for each query)."""
    for b in range(row_splits.size - 1):
        barred = excluded[excluded_splits[b] : excluded_splits[b + 1]]
        for j in range(row_splits[b], row_splits[b + 1]):
            at = np.searchsorted(barred, item_index[j])
            out[j] = at == barred.size or barred[at] != item_index[j]


@numba.njit(nogil=True, cache=True)
def advance(
    visited: UInt64[np.ndarray, "batch words"],
    keys: UInt64[np.ndarray, "batch allocated"],
    expanded: UInt8[np.ndarray, "batch allocated"],
    size: Int32[np.ndarray, " batch"],
    forgets: bool,
    width: int,
    frontier: Int32[np.ndarray, "batch width"],
    frontier_score: Float32[np.ndarray, "batch width"],
    count: Int32[np.ndarray, " batch"],
) -> None:
    """`forget` when told to, then `select`: one call, since entering a compiled loop costs microseconds."""
    if forgets:
        forget(visited, keys, expanded, size)
    select(keys, expanded, size, width, frontier, frontier_score, count)


@numba.njit(nogil=True, cache=True)
def gather_rows(
    tables: tuple[UInt[np.ndarray, "N words"], ...],
    item_index: Int32[np.ndarray, " total"],
    segments: Int32[np.ndarray, "segments 4"],
    rows_per_tile: int,
    pairs: int,
    outs: tuple[UInt[np.ndarray, "rows words"], ...],
    tile_query: Int32[np.ndarray, " tiles"],
) -> None:
    """Lay candidates out as tiles: for each segment (query, start, stop, row) and each table,
    ``out[row : row + stop - start] = table[item_index[start:stop]]``; rows up to ``pairs`` that no
    segment fills are zero; ``tile_query`` says whose each tile is. Rows are moved as whole words.
    """
    for t in range(len(tables)):
        table, out = tables[t], outs[t]
        words = table.shape[1]
        line = _CACHE_LINE_BYTES // table.itemsize
        filled = 0
        for s in range(segments.shape[0]):
            start, stop, row = segments[s, 1], segments[s, 2], segments[s, 3]
            out[filled:row] = 0
            for j in range(start - _ROWS_AHEAD, stop):
                if j + _ROWS_AHEAD < stop:
                    ahead = np.int64(item_index[j + _ROWS_AHEAD])
                    for word in range(0, words, line):
                        prefetch(table, ahead, word)
                if j >= start:
                    source = item_index[j]
                    target = row + j - start
                    for word in range(words):
                        out[target, word] = table[source, word]
            filled = row + stop - start
        out[filled:pairs] = 0
    tile_query[:] = 0
    for s in range(segments.shape[0]):
        first = segments[s, 3] // rows_per_tile
        last = (segments[s, 3] + segments[s, 2] - segments[s, 1] - 1) // rows_per_tile
        for tile in range(first, last + 1):
            tile_query[tile] = segments[s, 0]
