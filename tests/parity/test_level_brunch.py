"""`level` answers exactly as NANN's served search on real clicks, a real graph and the real model.

The model is hardly trained (the reference does not care); scores are bit-equal whatever the search
(design, sameness rule b), so the exhaustive scan gives the reference its scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nann_reference import served_search

from nann.engine.artifacts import Artifact
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

DATA = Path(__file__).parents[3] / "shared" / "data" / "brunch" / "UserBehavior-brunch-small.csv.zst"
TOPNS = [
    (100, 200, 200, 200, 200, 200),
    (100, 200, 400, 400, 400, 200),
    (10, 20, 30, 20, 10, 50),
]
N_USERS = 12


@pytest.fixture(scope="module")
def brunch(tmp_path_factory) -> Path:
    if not DATA.is_file():
        pytest.skip(f"{DATA.name} is not there: the real data sets are not part of the repository")
    from nann.offline.build_index import GraphOptions, build_index
    from nann.offline.data.prepare import prepare
    from nann.offline.extract_embeddings import extract
    from nann.offline.train import TrainConfig, train

    run = tmp_path_factory.mktemp("brunch")
    prepare(DATA, run / "data")
    config = TrainConfig(batch_size=32, num_neg=20, max_steps=5, eval_users=1, jit=False, negative_groups=2)
    train(run / "data", run / "model", config)
    extract(run / "model", run / "embeddings")
    build_index(run / "embeddings", run / "index", options=GraphOptions(m=8, ef_construction=40, space="l2"))
    return run / "index"


@pytest.mark.data
@pytest.mark.slow
def test_level_equals_the_reference_on_brunch(brunch) -> None:
    artifact = Artifact.open(brunch)
    n = artifact.num_items
    engine = SearchEngine.load(brunch, lanes=1, max_batch=4, max_k=n, verify="fast")
    engine.warm_up()
    ids = np.asarray(artifact.item_ids)
    users = np.random.default_rng(0).choice(np.asarray(artifact.history_ids), N_USERS, replace=False)
    for user in users.tolist():
        history = engine.user_history(user)
        exact = Query(k=n, params=SearchParams(policy="exhaustive"), history=history)
        (every,) = engine.search([engine.check(exact)], 0)
        scores = np.empty(n, np.float32)
        scores[np.searchsorted(ids, every.item_ids)] = every.scores
        for topn in TOPNS:
            params = SearchParams(policy="level", level_topn=topn)
            prepared = engine.check(Query(k=topn[5], params=params, history=history))
            (hits,) = engine.search([prepared], 0)
            wanted, n_scored = served_search(
                scores, artifact.entry_points, artifact.neighbors[0], artifact.neighbors[1], topn
            )
            assert hits.item_ids == ids[wanted].tolist()
            assert hits.scores == scores[wanted].tolist()
            assert hits.n_scored == n_scored
