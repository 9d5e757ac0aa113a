"""`level` answers exactly as NANN's served search, here on random graphs."""

from __future__ import annotations

import numpy as np
import pytest
from engine_world import HISTORY_LENGTH, make_world
from nann_reference import served_search

from nann.engine.types import Query, SearchParams

TOPNS = [
    (3, 5, 7, 7, 4, 10),
    (8, 8, 8, 8, 8, 8),
    (1, 1, 1, 1, 1, 1),
    (50, 60, 70, 80, 90, 200),
    (20, 4, 3, 2, 1, 6),
]


@pytest.mark.parametrize("topn", TOPNS)
@pytest.mark.parametrize("seed", range(12))
def test_level_equals_the_reference(tmp_path, topn, seed) -> None:
    rng = np.random.default_rng(1000 + seed)
    world = make_world(
        tmp_path / "1",
        num_items=int(rng.integers(20, 600)),
        degree=int(rng.integers(2, 12)),
        seed=seed,
        connected=bool(seed % 2),
        entries=int(rng.integers(1, 20)),
    )
    engine = world.engine()
    histories = [rng.integers(0, len(world.item_ids), HISTORY_LENGTH) for _ in range(4)]
    params = SearchParams(policy="level", level_topn=topn)
    batch = [
        engine.check(Query(k=topn[5], params=params, history=world.item_ids[h].tolist())) for h in histories
    ]
    together = engine.search(batch, lane=0)
    for history, query, hits in zip(histories, batch, together, strict=True):
        wanted, n_scored = served_search(
            world.scores(history), world.entry_points, world.neighbors[0], world.neighbors[1], topn
        )
        assert hits.item_ids == world.item_ids[wanted].tolist()
        assert hits.scores == world.scores(history)[wanted].tolist()
        assert hits.n_scored == n_scored
        (alone,) = engine.search([query], lane=0)
        assert (alone.item_ids, alone.scores) == (hits.item_ids, hits.scores)
