"""The comparer of ranked answers finds every planted difference, both ways round."""

from __future__ import annotations

import pytest
from tied_answers import difference

BASE = ([4, 7, 1, 9], [5.0, 4.0, 3.0, 2.0])


def both(other: tuple[list[int], list[float]], tolerance: float = 0.01) -> tuple[bool, bool]:
    return difference(BASE, other, tolerance) is None, difference(other, BASE, tolerance) is None


@pytest.mark.parametrize(
    "other",
    [
        BASE,
        ([4, 7, 1, 9], [5.005, 4.0, 3.0, 1.995]),
        ([4, 7, 1, 8], [5.0, 4.0, 3.0, 2.005]),  # tied with the last, which took its place
    ],
)
def test_rounding_and_ties_at_the_end_are_no_difference(other: tuple[list[int], list[float]]) -> None:
    assert both(other) == (True, True)


def test_tied_items_may_change_places() -> None:
    one, other = ([1, 2, 3], [5.0, 4.0, 4.0]), ([1, 3, 2], [5.0, 4.0, 4.0])
    assert difference(one, other, 0.0) is None and difference(other, one, 0.0) is None


@pytest.mark.parametrize(
    "other",
    [
        ([4, 7, 1], [5.0, 4.0, 3.0]),  # shorter
        ([4, 7, 1, 9], [5.0, 4.1, 3.0, 2.0]),  # another score
        ([4, 7, 8, 9], [5.0, 4.0, 3.0, 2.0]),  # another item in the middle
        ([4, 7, 1, 8], [5.0, 4.0, 3.0, 2.5]),  # a better item at the end
        ([4, 7, 1, 8], [5.0, 4.0, 3.0, 1.5]),  # a worse one
        ([4, 1, 7, 9], [5.0, 3.0, 4.0, 2.0]),  # not sorted
        ([4, 7, 1, 9], [5.0, 4.0, 3.0, float("nan")]),
    ],
)
def test_every_other_difference_is_found_both_ways(other: tuple[list[int], list[float]]) -> None:
    assert both(other) == (False, False)
