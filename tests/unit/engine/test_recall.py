"""Recall of one answer; the rows of many users are in tests/unit/offline/metrics/test_ranking.py."""

from __future__ import annotations

import pytest

from nann.engine.recall import recall_of_hits
from nann.engine.types import Hits


def hits(*scores: float) -> Hits:
    return Hits(item_ids=list(range(len(scores))), scores=scores, n_scored=0, steps=0)


@pytest.mark.parametrize(
    ("found", "exhaustive", "k", "recall"),
    [
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.0), 3, 1.0),
        ((3.0, 1.0, 0.5), (3.0, 2.0, 1.0), 3, 2 / 3),
        ((2.0, 2.0), (2.0, 2.0, 2.0), 2, 1.0),  # another item of equal score is no miss
        ((3.0,), (3.0, 2.0, 1.0), 3, 1 / 3),  # a short answer
        ((), (3.0,), 1, 0.0),
        ((3.0, 2.0), (3.0, 2.0), 200, 1.0),  # no more are admissible
        ((), (), 5, 1.0),
    ],
)
def test_recall_goes_by_score(
    found: tuple[float, ...], exhaustive: tuple[float, ...], k: int, recall: float
) -> None:
    assert recall_of_hits(hits(*found), hits(*exhaustive), k) == pytest.approx(recall)
