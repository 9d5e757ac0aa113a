"""Recall@k against the exhaustive answer, where both may have rounded a pair's score differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64

__all__ = ["Ranked", "recall"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Answers of several users, best first: item ids, -1 padded, and scores, -inf padded."""

    items: Int64[np.ndarray, "users k"]
    scores: Float32[np.ndarray, "users k"]

    @classmethod
    def empty(cls, users: int, k: int) -> Ranked:
        """Answers without an item."""
        return cls(np.full((users, k), -1, np.int64), np.full((users, k), -np.inf, np.float32))

    @classmethod
    def of(cls, hits: Sequence[Any], k: int) -> Ranked:
        """Of the engine's `Hits`, one a user."""
        ranked = cls.empty(len(hits), k)
        for user, found in enumerate(hits):
            ranked.put(user, found)
        return ranked

    def put(self, user: int, found: Any) -> None:
        """Set one user's answer from the engine's `Hits`."""
        n = len(found.item_ids)
        self.items[user], self.scores[user] = -1, -np.inf
        self.items[user, :n], self.scores[user, :n] = found.item_ids, found.scores

    def some(self, users: Any) -> Ranked:
        """The answers of these users (an index, slice or mask)."""
        return Ranked(self.items[users], self.scores[users])


def recall(found: Ranked, exact: Ranked) -> Float64[np.ndarray, " users"]:
    """Share of each user's exact answer that was found.

    An item counts when it is in the exact answer, or scores no less than that answer's last: so that ties
    are no misses, and neither is an item that the exhaustive program rounded up and the tiled one down.
    """
    shares = np.ones(len(found.items))
    for user, (items, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        wanted = exact.items[user] >= 0
        if not wanted.any():
            continue
        last = exact.scores[user][wanted][-1]
        there = (items >= 0) & (np.isin(items, exact.items[user][wanted]) | (scores >= last))
        shares[user] = min(1.0, there.sum() / wanted.sum())
    return shares
