"""Recall and cost of a search over many users, and its cost at equal recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["K", "Point", "Users", "at_recall", "pareto", "replay"]

K = 200
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Users:
    """Histories [U, length] (-1 padded), exhaustive scores [U, N] and each user's K-th best score [U]."""

    history: Int32[np.ndarray, "U length"]
    scores: Float32[np.ndarray, "U N"]
    kth: Float32[np.ndarray, " U"]

    @classmethod
    def load(cls, directory: Path, limit: int | None = None) -> Users:
        """Read what `scores` wrote."""
        scores = np.load(directory / "scores.npy", mmap_mode="r")
        history = np.load(directory / "hist.npy")
        rows = slice(None, limit)
        kth = np.array([np.partition(row, -K)[-K] for row in scores[rows]])
        return cls(history[rows], scores[rows], kth)

    def __len__(self) -> int:
        return len(self.kth)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of one search: mean and 5th percentile of recall@200, means of items scored and steps."""

    name: str
    recall: float
    recall_p5: float
    scored: float
    steps: float


def replay(name: str, users: Users, search: Callable[[int, Any, Any], tuple[int, int, Any]]) -> Point:
    """Run ``search(user, scores, scratch)`` for every user; `scratch` gives fresh marks (`Scratch`)."""
    num_items = users.scores.shape[1]

    def run(rows: Sequence[int]) -> list[tuple[float, int, int]]:
        scratch = Scratch(num_items)
        found = []
        for user in rows:
            scores = np.ascontiguousarray(users.scores[user])
            scored, steps, ids = search(user, scores, scratch.next())
            # By score, so that a tie at the K-th place may go either way.
            found.append((min(K, int((scores[ids] >= users.kth[user]).sum())) / K, scored, steps))
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(run, [range(t, len(users), _THREADS) for t in range(_THREADS)]))
    recall, scored, steps = np.array([row for part in parts for row in part]).T
    return Point(name, recall.mean(), float(np.percentile(recall, 5)), scored.mean(), steps.mean())


class Scratch:
    """Arrays a search marks what it saw in, reused for the next user by a new stamp."""

    def __init__(self, num_items: int) -> None:
        self.visited = np.zeros(num_items, np.int32)
        self.votes = np.zeros(num_items, np.int32)
        self.stamp = 0

    def next(self) -> Scratch:
        self.stamp += 2  # a search may use two
        return self


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both recall and items scored, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.scored, -p.recall)):
        if not front or point.recall > front[-1].recall:
            front.append(point)
    return front


def at_recall(points: Sequence[Point], recall: float) -> float:
    """Items scored at `recall`, interpolated between neighbours on the front; NaN outside its range.

    Linear in log(items scored) against log(1 - recall), in which the fronts are nearly straight.
    """
    front = pareto(points)
    miss = np.log1p(-np.array([min(p.recall, 1 - 1e-6) for p in front]))
    wanted = np.log1p(-recall)
    if not front or not miss[-1] <= wanted <= miss[0]:
        return float("nan")
    return float(np.exp(np.interp(-wanted, -miss, np.log([p.scored for p in front]))))
