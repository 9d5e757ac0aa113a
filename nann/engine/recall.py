"""Recall of an answer against the exhaustive one, by score: what evaluation and the live server both use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nann.engine.types import Hits

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int

__all__ = ["recall_at_k", "recall_of_hits", "share_found"]


def recall_at_k(
    scores: Float[np.ndarray, "users width"],
    exhaustive_scores: Float[np.ndarray, "users exhaustive_width"],
    k: int,
    *,
    tolerance: float = 0.0,
) -> Float64[np.ndarray, " users"]:
    """Share of the exhaustive top k that an answer reaches, by score, so that ties are no misses.

    An item counts when its score is at least the exhaustive k-th score less `tolerance` (recall by score,
    as in ann-benchmarks). Rows are sorted, best first; -inf or NaN where a row is short. Where fewer than
    k items are admissible, the exhaustive row is shorter and all of it is asked for. ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, should be at least 1")
    wanted = exhaustive_scores[:, :k]
    n_wanted = np.isfinite(wanted).sum(axis=1)
    last = np.take_along_axis(wanted, np.maximum(n_wanted - 1, 0)[:, None], axis=1)
    got = scores[:, :k]
    n_found = (np.isfinite(got) & (got >= last - tolerance)).sum(axis=1)
    return share_found(n_found, n_wanted)


def recall_of_hits(hits: Hits, exhaustive: Hits, k: int) -> float:
    """`recall_at_k` of one answer; 1 where nothing is admissible."""
    if not exhaustive.scores:
        return 1.0
    return float(recall_at_k(np.array([hits.scores], float), np.array([exhaustive.scores], float), k)[0])


def share_found(
    found: Int[np.ndarray, " users"], wanted: Int[np.ndarray, " users"]
) -> Float64[np.ndarray, " users"]:
    """found / wanted; 1 where nothing was wanted, for then nothing is missed."""
    return np.where(wanted > 0, np.minimum(found, wanted) / np.maximum(wanted, 1), 1.0)
