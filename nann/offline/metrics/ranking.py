"""How good ranked answers are, per user and over users.

Words as in the house style: *hit_rate_at_k* (the held-out item is among the k; NANN's paper calls it
recall) and *recall_at_k* (the share of the exhaustive top k that was found; there called coverage).
Answers are rows of item indices, best first, -1 where an answer is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.recall import recall_at_k, share_found

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int

__all__ = [
    "HeldOutMetrics",
    "Interval",
    "bootstrap_mean",
    "held_out_metrics",
    "hits_at_k",
    "id_overlap_at_k",
    "ndcg_at_k",
    "percentiles",
    "recall_at_k",
]


@dataclass(frozen=True, slots=True)
class HeldOutMetrics:
    """Means over users against the one held-out item, as NANN's `test` and `test_all` print them."""

    k: int
    n_users: int
    hit_rate: float
    precision: float
    recall: float
    f1: float
    ndcg: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def hits_at_k(
    retrieved: Int[np.ndarray, "users width"], targets: Int[np.ndarray, " users"], k: int
) -> Bool[np.ndarray, " users"]:
    """Whether each user's target is among the first k of the answer; ValueError for k < 1."""
    return np.asarray((_first(retrieved, k) == targets[:, None]).any(axis=1))


def ndcg_at_k(
    retrieved: Int[np.ndarray, "users width"], targets: Int[np.ndarray, " users"], k: int
) -> Float64[np.ndarray, " users"]:
    """1 / log2(rank + 1) with the target's rank from 1, 0 when it is not in the first k.

    The ideal order has the only relevant item first, so its gain is 1 and nothing is left to divide by
    (Järvelin and Kekäläinen, 2002).
    """
    found = _first(retrieved, k) == targets[:, None]
    discount = 1.0 / np.log2(np.arange(found.shape[1]) + 2.0)
    return np.asarray(np.where(found.any(axis=1), discount[found.argmax(axis=1)], 0.0))


def held_out_metrics(
    retrieved: Int[np.ndarray, "users width"], targets: Int[np.ndarray, " users"], k: int
) -> HeldOutMetrics:
    """Hit rate, precision, recall, F1 and NDCG at k, each the mean over users.

    With one relevant item a user's recall is 1 or 0, precision 1/k or 0 and F1 2/(k+1) or 0, so the F1 of
    the means equals the mean of the F1s. A short answer still counts k in precision.
    """
    hits = hits_at_k(retrieved, targets, k).astype(np.float64)
    recall = hits
    precision = hits / k
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return HeldOutMetrics(
        k=k,
        n_users=len(targets),
        hit_rate=_mean(hits),
        precision=_mean(precision),
        recall=_mean(recall),
        f1=_mean(f1),
        ndcg=_mean(ndcg_at_k(retrieved, targets, k)),
    )


def id_overlap_at_k(
    retrieved: Int[np.ndarray, "users width"],
    exhaustive: Int[np.ndarray, "users exhaustive_width"],
    k: int,
) -> Float64[np.ndarray, " users"]:
    """Share of the exhaustive top k items that an answer holds, by id: of equal scores one may be missed."""
    wanted, got = _first(exhaustive, k), _first(retrieved, k)
    stride = max(int(wanted.max(initial=-1)), int(got.max(initial=-1))) + 1
    row = np.arange(len(wanted), dtype=np.int64)[:, None] * stride  # makes an id of another user another id
    found = np.isin(wanted + row, np.where(got >= 0, got + row, -1)) & (wanted >= 0)
    return share_found(found.sum(axis=1), (wanted >= 0).sum(axis=1))


def percentiles(
    values: Float[np.ndarray, " users"], points: Sequence[float] = (1, 5, 10, 50, 90, 95, 99)
) -> dict[str, float]:
    """Percentiles over users, by name: `p50` and so on; ValueError without a value."""
    if not len(values):
        raise ValueError("percentiles of no values")
    return {f"p{point:g}": float(v) for point, v in zip(points, np.percentile(values, points), strict=True)}


def bootstrap_mean(
    values: Float[np.ndarray, " users"], *, seed: int = 0, n_resamples: int = 1000, confidence: float = 0.95
) -> Interval:
    """The mean and its percentile bootstrap interval (Efron, 1979), resampling users.

    ValueError without a value, or for a confidence outside 0 .. 1.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    rng = np.random.default_rng(seed)
    # Distinct values are few (hits are 0 or 1), so a resample is a multinomial draw of their counts.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=n_resamples)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn @ distinct / len(values), [tail, 100 - tail])
    return Interval(float(np.mean(values)), float(low), float(high))


def _first(rows: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise ValueError(f"k is {k}, should be at least 1")
    return rows[:, :k]


def _mean(values: Float64[np.ndarray, " users"]) -> float:
    if not len(values):
        raise ValueError("metrics over no users")
    return float(values.mean())
