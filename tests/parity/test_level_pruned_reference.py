"""`level_pruned` answers exactly as the search that NANN evaluates, on random graphs and every backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from engine_world import HISTORY_LENGTH, IntegerScorer, make_world
from nann_reference import evaluated_search
from registry import BACKENDS, AdaptedScorer

from nann.engine.artifacts import Artifact
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

MAX_BATCH, MAX_ROWS = 4, 256
# (ef2, ef1, ef0), steps on level 0: narrow, one step, wider than the corpus, narrowing downwards.
SETTINGS = [((3, 5, 9), 3), ((4, 8, 16), 1), ((50, 60, 800), 3), ((20, 6, 4), 2), ((1, 1, 1), 3)]


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    with BACKENDS[request.param].around():
        yield request.param


@pytest.mark.parametrize(("level_ef", "level_steps"), SETTINGS)
@pytest.mark.parametrize("seed", range(8))
def test_level_pruned_equals_the_reference(tmp_path, backend, level_ef, level_steps, seed) -> None:
    rng = np.random.default_rng(2000 + seed)
    world = make_world(
        tmp_path / "1",
        num_items=int(rng.integers(20, 600)),
        degree=int(rng.integers(2, 12)),
        seed=seed,
        connected=bool(seed % 2),
        entries=int(rng.integers(1, 20)),
    )
    artifact, case = Artifact.open(world.directory), BACKENDS[backend]
    lane = case.make(
        num_items=artifact.num_items,
        neighbors=artifact.neighbors,
        item_state=artifact.item_state,
        max_batch=MAX_BATCH,
        max_pairs=MAX_ROWS,
    )
    scorer = AdaptedScorer(case, IntegerScorer(world.item_vectors, max_batch=MAX_BATCH, max_rows=MAX_ROWS))
    engine = SearchEngine(artifact, [(lane, scorer)], max_batch=MAX_BATCH)
    params = SearchParams(policy="level_pruned", level_ef=level_ef, level_steps=level_steps)
    histories = [rng.integers(0, len(world.item_ids), HISTORY_LENGTH) for _ in range(MAX_BATCH)]
    k = int(rng.integers(1, level_ef[2] + 1))
    queries = [engine.check(Query(k=k, params=params, history=world.item_ids[h].tolist())) for h in histories]
    for history, hits in zip(histories, engine.search(queries, lane=0), strict=True):
        scores = world.scores(history)
        wanted, n_scored = evaluated_search(
            scores, world.entry_points, *world.neighbors, level_ef, level_steps, k
        )
        assert hits.item_ids == world.item_ids[wanted].tolist()
        assert hits.scores == scores[wanted].tolist()
        assert hits.n_scored == n_scored
