from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from nann.offline.benchmark.gpu.quality import Ranked, recall


def hits(*pairs: tuple[int, float]) -> Any:
    return SimpleNamespace(item_ids=[item for item, _ in pairs], scores=[score for _, score in pairs])


def share(found: Any, exact: Any, k: int = 3) -> float:
    return float(recall(Ranked.of([found], k), Ranked.of([exact], k))[0])


EXACT = hits((1, 9.0), (2, 8.0), (3, 7.0))


def test_items_of_the_exact_answer_count() -> None:
    assert share(EXACT, EXACT) == 1
    assert share(hits((1, 9.0), (2, 8.0), (4, 6.0)), EXACT) == 2 / 3
    assert share(hits(), EXACT) == 0


def test_a_tie_with_the_last_is_no_miss() -> None:
    assert share(hits((1, 9.0), (2, 8.0), (4, 7.0)), EXACT) == 1


def test_neither_is_the_same_item_rounded_down() -> None:
    assert share(hits((1, 9.0), (2, 8.0), (3, 6.999)), EXACT) == 1


def test_where_fewer_are_admissible_fewer_are_wanted() -> None:
    assert share(hits((1, 9.0)), hits((1, 9.0), (2, 8.0))) == 0.5
    assert share(hits((1, 9.0), (2, 8.0), (3, 8.0)), hits((1, 9.0), (2, 8.0))) == 1
    assert share(hits(), hits()) == 1


def test_some_users_are_chosen() -> None:
    ranked = Ranked.of([EXACT, hits((7, 1.0))], 3)
    assert ranked.some([1]).items.tolist() == [[7, -1, -1]]
    assert ranked.some(np.array([True, False])).scores.tolist() == [[9.0, 8.0, 7.0]]
