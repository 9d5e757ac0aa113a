"""What the model's own answers to training users say about the graph: edges, and where to start.

Two items that are answered to the same users lie near each other for the model, however far apart their
embeddings are, and what is answered to many is a good place to look first. On Brunch such edges and starts
cut the items scored for the same recall by half again (docs/research/search.md, "Graphs").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64

__all__ = ["co_answered", "most_answered"]

_LEAST = 2  # answers two items must share: one says no more than that both were answered once
# n_ij / n_j ** power: 0 links everything to the most answered items, 1 to rare ones; 0.5 was best of
# 0, 0.25, 0.5 and 1 on Brunch's validation users.
_POWER = 0.5


def co_answered(
    answers: Int32[np.ndarray, "users k"], num_items: int, count: int
) -> Int32[np.ndarray, "N count"]:
    """For each item i the `count` items j that are answered with it most often, by n_ij / sqrt(n_j).

    n_ij are the answers that hold both, n_j those that hold j; `answers` are item indices, -1 where an answer
    is shorter. Rows are padded with -1 at their end.
    """
    users, _ = np.nonzero(answers >= 0)
    items = answers[answers >= 0]
    order = np.argsort(items, kind="stable")
    splits = np.zeros(num_items + 1, dtype=np.int64)
    np.cumsum(np.bincount(items, minlength=num_items), out=splits[1:])
    weight = (np.maximum(np.diff(splits), 1) ** -_POWER).astype(np.float32)
    out = np.full((num_items, count), -1, dtype=np.int32)
    _co_answered(answers, users[order], splits, weight, out)
    return out


def most_answered(
    answers: Int32[np.ndarray, "users k"], num_items: int, count: int
) -> Int32[np.ndarray, " n"]:
    """The `count` items in most answers, those first, ties by index; fewer where fewer were answered."""
    n = np.bincount(answers[answers >= 0], minlength=num_items)
    best = np.argsort(-n, kind="stable")[:count]
    return best[n[best] > 0].astype(np.int32)


@numba.njit(cache=True)
def _co_answered(
    answers: Int32[np.ndarray, "users k"],
    users: Int64[np.ndarray, " occurrences"],
    splits: Int64[np.ndarray, " N+1"],
    weight: Float32[np.ndarray, " N"],
    out: Int32[np.ndarray, "N count"],
) -> None:
    """``users[splits[i] : splits[i + 1]]`` are those whose answer holds item i."""
    together = np.zeros(len(weight), dtype=np.int32)
    met = np.empty(len(weight), dtype=np.int32)
    for item in range(len(weight)):
        n_met = 0
        for user in users[splits[item] : splits[item + 1]]:
            for other in answers[user]:
                if other < 0 or other == item:
                    continue
                if together[other] == 0:
                    met[n_met] = other
                    n_met += 1
                together[other] += 1
        others = met[:n_met]
        others.sort()  # ties below go to the lower index
        strength = np.empty(n_met, dtype=np.float32)
        for j in range(n_met):
            shared = together[others[j]]
            strength[j] = -weight[others[j]] * shared if shared >= _LEAST else np.float32(0)
            together[others[j]] = 0
        order = np.argsort(strength, kind="mergesort")
        for place in range(min(out.shape[1], n_met)):
            if strength[order[place]] < 0:
                out[item, place] = others[order[place]]
