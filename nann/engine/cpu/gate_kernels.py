"""The gate on the CPU, compiled by numba: estimates of neighbours, and which of them get scored.

float32 throughout, every sum in the order of its index, products and sums rounded separately (no fused
multiply-add): an estimate has the same bits on every backend, so the same items are admitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from nann.engine.cpu.kernels import expand_one, is_set, key_of, score_of, test_and_set
from nann.engine.cpu.largest_product import largest_product
from nann.engine.cpu.prefetch import prefetch

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64, UInt64

__all__ = ["expand_gated"]

_LOW32 = np.uint64(0xFFFFFFFF)
_ROWS_AHEAD = 8
_CACHE_LINE_WORDS = 16  # of four bytes


@numba.njit(nogil=True, cache=True)
def _estimate(
    row: Float32[np.ndarray, " columns"],
    bias: Float32[np.ndarray, " width"],
    keys: Float32[np.ndarray, "dim width"],
    context: Float32[np.ndarray, " context_dim"],
    width: int,
) -> np.float32:
    """``b + max_j(a_j + k_j · q) + x · y`` of one candidate's row (b, q, y)."""
    estimate = row[0] + largest_product(bias, keys, row, 1, width)
    for t in range(context.size):
        estimate += context[t] * row[1 + keys.shape[0] + t]
    return np.float32(estimate)


@numba.njit(nogil=True, cache=True)
def _ask_for(rows: np.ndarray, row: int) -> None:
    """Have a row brought into the cache."""
    for column in range(0, rows.shape[1], _CACHE_LINE_WORDS):
        prefetch(rows, np.int64(row), column)


@numba.njit(nogil=True, cache=True)
def _passing(
    visited: UInt64[np.ndarray, " words"],
    neighbors: Int32[np.ndarray, "N degree"],
    frontier: Int32[np.ndarray, " count"],
    frontier_score: Float32[np.ndarray, " count"],
    queries: Float32[np.ndarray, "N columns"],
    bias: Float32[np.ndarray, " width"],
    keys: Float32[np.ndarray, "dim width"],
    context: Float32[np.ndarray, " context_dim"],
    width: int,
    residual_weight: np.float32,
    threshold: np.float32,
    fresh: UInt64[np.ndarray, " capacity"],
) -> tuple[int, int]:
    """Keys (`kernels.pack`) of the estimates that reach the threshold, an item once for each node it was
    met from; returns how many, and how many estimates were made."""
    found = estimated = 0
    for j in range(-_ROWS_AHEAD, frontier.size):
        if j + _ROWS_AHEAD < frontier.size:
            _ask_for(neighbors, frontier[j + _ROWS_AHEAD])
        if j < 0:
            continue
        parent = frontier[j]
        for item in neighbors[parent]:
            if item < 0:
                break
            _ask_for(queries, item)
        own = _estimate(queries[parent], bias, keys, context, width)
        residual = residual_weight * (frontier_score[j] - own)
        estimated += 1
        for item in neighbors[parent]:
            if item < 0:
                break
            if is_set(visited, item):
                continue
            estimate = _estimate(queries[item], bias, keys, context, width) + residual
            estimated += 1
            if estimate >= threshold:
                fresh[found] = key_of(estimate, item)
                found += 1
    return found, estimated


@numba.njit(nogil=True, cache=True)
def expand_gated(
    visited: UInt64[np.ndarray, "batch words"],
    neighbors: Int32[np.ndarray, "N degree"],
    frontier: Int32[np.ndarray, "batch width"],
    frontier_score: Float32[np.ndarray, "batch width"],
    count: Int32[np.ndarray, " batch"],
    pool_keys: UInt64[np.ndarray, "batch allocated"],
    pool_size: Int32[np.ndarray, " batch"],
    queries: Float32[np.ndarray, "N columns"],
    bias: Float32[np.ndarray, "batch known"],
    keys: Float32[np.ndarray, "batch dim known"],
    context: Float32[np.ndarray, "batch context_dim"],
    known: Int32[np.ndarray, " batch"],
    rank: Int32[np.ndarray, " batch"],
    margin: Float32[np.ndarray, " batch"],
    residual_weight: Float32[np.ndarray, " batch"],
    admit: int,
    fresh: UInt64[np.ndarray, " capacity"],
    estimated: Int64[np.ndarray, " batch"],
    out: Int32[np.ndarray, " total"],
    out_splits: Int32[np.ndarray, " batch+1"],
) -> None:
    """Of the unvisited neighbours of each query's frontier the best `admit` that pass its gate; only they
    are visited now. A query with ``known[b] == 0`` has no gate: all of its neighbours are taken.

    ``keys[b]`` are transposed and padded to ``known[b]`` columns, whole vectors, by biases of -inf. An item
    met from several nodes has the largest of its estimates. ``estimated`` counts estimates.
    """
    out_splits[0] = 0
    for b in range(count.size):
        nodes, n = frontier[b, : count[b]], out_splits[b]
        if known[b] == 0:
            out_splits[b + 1] = n + expand_one(visited[b], neighbors, nodes, out[n:])
            continue
        threshold = -np.float32(np.inf)
        if rank[b] <= pool_size[b]:
            threshold = score_of(pool_keys[b, rank[b] - 1]) - margin[b]
        found, made = _passing(
            visited[b],
            neighbors,
            nodes,
            frontier_score[b],
            queries,
            bias[b],
            keys[b],
            context[b],
            known[b],
            residual_weight[b],
            threshold,
            fresh,
        )
        estimated[b] += made
        if found > admit:
            fresh[:found].sort()
        last = n + admit
        for j in range(found):
            if n == last:
                break
            item = np.int32(fresh[j] & _LOW32)
            if not test_and_set(visited[b], item):
                out[n] = item
                n += 1
        out_splits[b + 1] = n
