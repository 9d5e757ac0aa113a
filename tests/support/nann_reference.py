"""NANN's two searches in plain Python, from reference/nann.md ("Served", "Evaluated"): oracles for `level`
and `level_pruned`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def ranked(items: Iterable[int], scores: np.ndarray) -> list[int]:
    """By score descending, then item index ascending."""
    return sorted(items, key=lambda i: (-scores[i], i))


def neighbours(table: np.ndarray, frontier: Iterable[int], visited: set[int]) -> list[int]:
    """Unvisited neighbours of the frontier, once each; they are visited from now on."""
    new = []
    for node in frontier:
        for item in table[node]:
            if item >= 0 and int(item) not in visited:
                visited.add(int(item))
                new.append(int(item))
    return new


def served_search(
    scores: np.ndarray,
    entry_points: np.ndarray,
    level_0: np.ndarray,
    level_1: np.ndarray,
    level_topn: Sequence[int],
) -> tuple[list[int], int]:
    """The item indices NANN answers with, and how many items it scores.

    The one departure is the design's: too few candidates shorten the answer instead of failing it.
    """
    t = level_topn
    n_scored = len(entry_points)
    kept = ranked((int(i) for i in entry_points), scores)[: t[0]]
    new = neighbours(level_1, kept, set(kept))
    n_scored += len(new)
    candidates = ranked([*kept, *new], scores)[: t[1]]
    result, frontier, visited = list(candidates), list(candidates), set(candidates)
    for i in range(3):
        new = neighbours(level_0, frontier, visited)
        n_scored += len(new)
        frontier = ranked(new, scores)[: t[2 + i]]
        result += frontier
    return ranked(result, scores)[: t[5]], n_scored


def evaluated_search(
    scores: np.ndarray,
    entry_points: np.ndarray,
    level_0: np.ndarray,
    level_1: np.ndarray,
    level_ef: Sequence[int],
    steps_0: int,
    k: int,
) -> tuple[list[int], int]:
    """The item indices of the search that NANN evaluates, and how many items it scores.

    The frontier is found by comparing scores with the pool's worst, as NANN has it; ties with the worst
    go by item index. Every level starts with the pool of the one above, as frontier and as visited.
    """
    n_scored = len(entry_points)
    pool = ranked((int(i) for i in entry_points), scores)[: level_ef[0]]
    for table, ef, steps in ((level_1, level_ef[1], 1), (level_0, level_ef[2], steps_0)):
        frontier, visited = list(pool), set(pool)
        for _ in range(steps):
            new = neighbours(table, frontier, visited)
            n_scored += len(new)
            pool = ranked([*pool, *new], scores)[:ef]
            if not pool:
                break
            worst = (scores[pool[-1]], -pool[-1])
            frontier = [i for i in new if (scores[i], -i) >= worst]
    return ranked(pool, scores)[:k], n_scored
