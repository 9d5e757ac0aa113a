"""The searches as loops over one user's exhaustive scores; what they look up counts as scored.

Every search takes `scores` [N] of one user, a graph padded with -1 and its starting nodes, and returns
(items scored, steps, the ids of its answer pool). `visited` [N] is scratch, marked with `stamp`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["best_first", "evaluated", "level", "voted"]


@njit(cache=True, nogil=True)
def _merge(pool, pool_scores, expanded, size, fresh, n_fresh, scores, capacity):  # type: ignore[no-untyped-def]
    """The best `capacity` of pool and fresh items, best first; returns size and newcomers to the top 200."""
    total = size + n_fresh
    ids = np.empty(total, np.int32)
    values = np.empty(total, np.float32)
    done = np.zeros(total, np.bool_)
    ids[:size] = pool[:size]
    values[:size] = pool_scores[:size]
    done[:size] = expanded[:size]
    for j in range(n_fresh):
        ids[size + j] = fresh[j]
        values[size + j] = scores[fresh[j]]
    order = np.argsort(-values)
    kept = min(capacity, total)
    newcomers = 0
    for j in range(kept):
        pool[j] = ids[order[j]]
        pool_scores[j] = values[order[j]]
        expanded[j] = done[order[j]]
        if j < 200 and order[j] >= size:
            newcomers += 1
    return kept, newcomers


@njit(cache=True, nogil=True)
def best_first(  # type: ignore[no-untyped-def]  # noqa: PLR0912  # one loop, every rule that was tried
    scores, graph, starts, visited, stamp, ef, beam, near, answer, patience, least_share, margin, growth, most
):
    """Expand the best unexpanded nodes of the best `ef`, `beam` a step, until none is left.

    `near`: neighbours used of each node; `answer`: size of the answer pool, at least 200. Stops early
    when for `patience` steps (0: never) no more than `least_share` of what was scored joined the top 200,
    or after `most` steps. Only nodes within `margin` (in units of the spread of the top 200) of the
    200th score are expanded; the beam grows by the factor `growth` a step.
    """
    capacity = max(ef, answer)
    pool = np.empty(capacity, np.int32)
    pool_scores = np.empty(capacity, np.float32)
    expanded = np.zeros(capacity, np.bool_)
    fresh = np.empty(max(len(starts), 4096 * graph.shape[1]), np.int32)
    size = 0
    n_fresh = 0
    for node in starts:
        if node >= 0 and visited[node] != stamp:
            visited[node] = stamp
            fresh[n_fresh] = node
            n_fresh += 1
    scored = 0
    steps = 0
    quiet = 0
    width = float(beam)
    while True:
        scored += n_fresh
        steps += 1
        size, newcomers = _merge(pool, pool_scores, expanded, size, fresh, n_fresh, scores, capacity)
        if n_fresh > 0 and newcomers <= least_share * n_fresh:
            quiet += 1
        else:
            quiet = 0
        if steps > most or (patience > 0 and quiet >= patience):
            break
        floor = -np.inf
        if size >= 200 and margin < 1e9:
            floor = pool_scores[199] - margin * (pool_scores[0] - pool_scores[199])
        n_fresh = 0
        opened = 0
        for j in range(min(size, ef)):
            if expanded[j]:
                continue
            if pool_scores[j] < floor or opened >= int(width):
                break
            expanded[j] = True
            opened += 1
            row = graph[pool[j]]
            for slot in range(min(near, len(row))):
                node = row[slot]
                if node >= 0 and visited[node] != stamp:
                    visited[node] = stamp
                    fresh[n_fresh] = node
                    n_fresh += 1
        if opened == 0:
            break
        width = min(width * growth, 4096.0)
    return scored, steps, pool[: min(size, answer)].copy()


@njit(cache=True, nogil=True)
def voted(  # type: ignore[no-untyped-def]
    scores, graph, starts, visited, stamp, votes, ef, beam, least, trusted
):
    """Best first, but a neighbour is scored only once `least` expanded nodes lead to it, or one of the
    best `trusted` of the pool does. `votes` [N] is scratch, zero before and after."""
    capacity = max(ef, 200)
    pool = np.empty(capacity, np.int32)
    pool_scores = np.empty(capacity, np.float32)
    expanded = np.zeros(capacity, np.bool_)
    fresh = np.empty(max(len(starts), 4096 * graph.shape[1]), np.int32)
    touched = np.empty(1 << 20, np.int32)
    n_touched = 0
    size = 0
    n_fresh = 0
    for node in starts:
        if node >= 0 and visited[node] != stamp:
            visited[node] = stamp
            fresh[n_fresh] = node
            n_fresh += 1
    scored = 0
    steps = 0
    while True:
        scored += n_fresh
        steps += 1
        size, _ = _merge(pool, pool_scores, expanded, size, fresh, n_fresh, scores, capacity)
        n_fresh = 0
        opened = 0
        for j in range(min(size, ef)):
            if expanded[j]:
                continue
            if opened >= beam:
                break
            expanded[j] = True
            opened += 1
            for node in graph[pool[j]]:
                if node >= 0 and visited[node] != stamp:
                    if votes[node] == 0:
                        touched[n_touched] = node
                        n_touched += 1
                    votes[node] += 1
                    if votes[node] >= least or j < trusted:
                        visited[node] = stamp
                        fresh[n_fresh] = node
                        n_fresh += 1
        if opened == 0:
            break
    for j in range(n_touched):
        votes[touched[j]] = 0
    return scored, steps, pool[: min(size, 200)].copy()


@njit(cache=True, nogil=True)
def _best(items, scores, k):  # type: ignore[no-untyped-def]
    """The best k of `items`, best first."""
    return items[np.argsort(-scores[items])[:k]]


@njit(cache=True, nogil=True)
def _neighbours(graph, frontier, visited, stamp):  # type: ignore[no-untyped-def]
    found = np.empty(len(frontier) * graph.shape[1], np.int32)
    n = 0
    for node in frontier:
        for other in graph[node]:
            if other >= 0 and visited[other] != stamp:
                visited[other] = stamp
                found[n] = other
                n += 1
    return found[:n]


@njit(cache=True, nogil=True)
def level(scores, ground, upper, entries, visited, stamp, topn):  # type: ignore[no-untyped-def]
    """NANN's served search with `topn` [6] (reference/nann.md, "Served"); marks with `stamp` and the next."""
    kept = _best(entries, scores, topn[0])
    visited[kept] = stamp
    new = _neighbours(upper, kept, visited, stamp)
    scored = len(entries) + len(new)
    pool = _best(np.concatenate((kept, new)), scores, topn[1])
    visited[pool] = stamp + 1
    frontier = pool
    for step in range(3):
        new = _neighbours(ground, frontier, visited, stamp + 1)
        scored += len(new)
        frontier = _best(new, scores, topn[2 + step])
        pool = np.concatenate((pool, frontier))
    return scored, 5, _best(pool, scores, topn[5])


@njit(cache=True, nogil=True)
def evaluated(scores, ground, upper, entries, visited, stamp, efs, steps):  # type: ignore[no-untyped-def]
    """NANN's evaluated search (reference/nann.md, "Evaluated"): `efs` and `steps` of levels 0, 1, 2."""
    visited[entries] = stamp
    scored = len(entries)
    pool = _best(entries, scores, efs[2])
    taken = 1
    for depth in (1, 0):
        graph = upper if depth == 1 else ground
        mark = stamp + 1 - depth  # every level sees the pool it starts from as its only visited nodes
        visited[pool] = mark
        frontier = pool
        for _ in range(steps[depth]):
            new = _neighbours(graph, frontier, visited, mark)
            scored += len(new)
            taken += 1
            pool = _best(np.concatenate((pool, new)), scores, efs[depth])
            worst = scores[pool[-1]]
            frontier = new[scores[new] >= worst]
            if len(frontier) == 0:
                break
    return scored, taken, pool[:200]
