"""Which settings are worth showing, and how costs compare: over users, with intervals.

A setting is chosen on some users and its figures are those of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.compare.quality import Measured
from nann.offline.metrics.ranking import Interval, bootstrap_mean

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = [
    "Point",
    "bootstrap_percentile",
    "cheapest_reaching",
    "pareto",
    "point",
    "ratio",
    "thinned",
    "worth_measuring",
]

_RESAMPLES = 1000
# Of recall, between settings measured on the same few users: half of the least step between two targets.
_CLEARLY = 0.005


@dataclass(frozen=True, slots=True)
class Point:
    """One setting over many users. `recall_p5` is the 5th percentile over them; `cost` is in scores."""

    setting: str
    params: Mapping[str, Any]
    n_users: int
    recall: Interval
    recall_p5: Interval
    hit_rate: Interval
    cost: Interval
    n_scored: float


def point(measured: Measured, multiply_adds_of_a_score: float) -> Point:
    """The figures of one setting, each with a 95 % bootstrap interval over users."""
    return Point(
        setting=measured.setting.words,
        params=measured.setting.params,
        n_users=len(measured.recall),
        recall=bootstrap_mean(measured.recall),
        recall_p5=bootstrap_percentile(measured.recall, 5),
        hit_rate=bootstrap_mean(measured.hit.astype(np.float64)),
        cost=bootstrap_mean(measured.cost(multiply_adds_of_a_score)),
        n_scored=float(measured.n_scored.mean()),
    )


def bootstrap_percentile(values: Float64[np.ndarray, " users"], percent: float, *, seed: int = 0) -> Interval:
    """A percentile over users and its 95 % percentile bootstrap interval (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    drawn = np.percentile(values[rng.integers(0, len(values), (_RESAMPLES, len(values)))], percent, axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(np.percentile(values, percent)), float(low), float(high))


def ratio(
    numerator: Float64[np.ndarray, " users"], denominator: Float64[np.ndarray, " users"], *, seed: int = 0
) -> Interval:
    """mean / mean of two figures of the same users; users are resampled together (95 % interval)."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(numerator), (_RESAMPLES, len(numerator)))
    drawn = numerator[rows].mean(axis=1) / denominator[rows].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(numerator.mean() / denominator.mean()), float(low), float(high))


def pareto(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other beats: each costs more than the one before and finds more."""
    order = sorted(range(len(points)), key=lambda i: (points[i].cost.mean, -points[i].recall.mean))
    kept: list[int] = []
    for i in order:
        if not kept or points[i].recall.mean > points[kept[-1]].recall.mean:
            kept.append(i)
    return kept


def worth_measuring(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other clearly beats: at no more cost it finds `_CLEARLY` more."""
    return [
        place
        for place, one in enumerate(points)
        if not any(
            other.cost.mean <= one.cost.mean and other.recall.mean >= one.recall.mean + _CLEARLY
            for other in points
        )
    ]


def cheapest_reaching(points: Sequence[Point], target: float) -> int | None:
    """The place of the cheapest point whose mean recall is at least `target`; None where none is."""
    good = [i for i, one in enumerate(points) if one.recall.mean >= target]
    return min(good, key=lambda i: points[i].cost.mean, default=None)


def thinned(places: Sequence[int], count: int, keep: Sequence[int]) -> list[int]:
    """At most `count` of `places`, the ends among them, and all of `keep`, in the order of `places`."""
    chosen = {places[round(i)] for i in np.linspace(0, len(places) - 1, min(count, len(places)))}
    return [place for place in places if place in chosen or place in set(keep)]
