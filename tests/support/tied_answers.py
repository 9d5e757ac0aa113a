"""Whether two ranked answers are the same, where scores differ a little and near ones change places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["difference"]

Answer = tuple[Sequence[Any], Sequence[float]]


def difference(one: Answer, other: Answer, tolerance: float) -> str | None:
    """Why two (item ids, scores), best first, are not the same by groups of tied scores; None when they are.

    Scores within `tolerance` of each other count as tied. An item of both must have the same score; an
    item of one alone must be tied with the other's last, so that the other may have cut it off. Both ways.
    """
    if len(one[0]) != len(other[0]):
        return f"{len(one[0])} items and {len(other[0])}"
    return _difference(one, other, tolerance) or _difference(other, one, tolerance)


def _difference(one: Answer, other: Answer, tolerance: float) -> str | None:
    scores = dict(zip(other[0], other[1], strict=True))
    for position, (item, score) in enumerate(zip(*one, strict=True)):
        if position and score > one[1][position - 1]:
            return f"item {item} of score {score} comes after one of {one[1][position - 1]}"
        if item in scores:
            if not abs(scores[item] - score) <= tolerance:
                return f"item {item} scores {score} and {scores[item]}"
        elif not abs(score - other[1][-1]) <= tolerance:
            return f"item {item} of score {score} is missing, and the last there has {other[1][-1]}"
    return None
