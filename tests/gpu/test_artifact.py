"""A published version on the GPU against the CPU: ``NANN_TEST_VERSION=REPOSITORY/MODEL/VERSION``.

The version must carry programs for both (``nann export --programs``), and the JAX it was exported for must be
installed; reading a version needs pydantic. Without these the test is skipped, and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gpu_place import Place
from tied_answers import difference

from nann.engine.errors import Unsupported
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

K, BATCH, USERS = 100, 4, 200
TOLERANCE = 1e-3  # of scores computed in float32 on both


@pytest.fixture(scope="module")
def version() -> Path:
    pytest.importorskip("pydantic", reason="reading a version needs pydantic")
    named = os.environ.get("NANN_TEST_VERSION")
    if not named:
        pytest.skip("NANN_TEST_VERSION names no published version")
    return Path(named)


@pytest.mark.parametrize("policy", ["best_first", "exhaustive"])
def test_a_published_version_answers_as_on_the_cpu(place: Place, version: Path, policy: str) -> None:
    from nann.engine.artifacts import Artifact

    users = Artifact.open(version, verify="fast").history_ids[:USERS]
    params = SearchParams(policy="exhaustive") if policy == "exhaustive" else SearchParams()
    answers = []
    for device in ("cuda:0", "cpu"):
        try:
            engine = SearchEngine.load(
                version, device=device, scorer="pjrt", lanes=1, max_batch=BATCH, verify="fast"
            )
        except Unsupported as error:
            pytest.skip(f"{device}: {error}")
        engine.warm_up()
        histories = [engine.user_history(user) for user in np.asarray(users).tolist()]
        queries = [engine.check(Query(K, params, history=history)) for history in histories if history]
        found = []
        for start in range(0, len(queries), BATCH):
            found += engine.search(queries[start : start + BATCH], 0)
        answers.append([(list(hits.item_ids), list(hits.scores)) for hits in found])
    differences = [difference(a, b, TOLERANCE) for a, b in zip(*answers, strict=True)]
    assert differences
    assert np.mean([words is None for words in differences]) >= 0.99, differences
