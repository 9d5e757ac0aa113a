"""A comparison over a random world: a real engine with an integer-valued model, no SavedModel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_world import IntegerScorer, World, make_world

from nann.engine.artifacts import Artifact
from nann.engine.devices import cpu_lanes
from nann.engine.search_engine import SearchEngine
from nann.offline.benchmark.compare.contender import UserSet
from nann.offline.benchmark.compare.corpus import NANN_GRAPH, OWN_GRAPH, Corpus, CorpusOptions
from nann.offline.benchmark.compare.multiply_adds import MultiplyAdds
from nann.offline.benchmark.compare.rerank import Reranker
from nann.offline.search_quality import EvalUsers

K = 10
LANES = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "version", num_items=300)


@pytest.fixture
def corpus(world: World, tmp_path: Path) -> Corpus:
    return _corpus(world, tmp_path)


@pytest.fixture(scope="module")
def shared_corpus(world: World, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One for all tests of a module that do not change it."""
    return _corpus(world, tmp_path_factory.mktemp("shared"))


def _corpus(world: World, directory: Path) -> Corpus:
    artifact = Artifact.open(world.directory)
    scorers = [IntegerScorer(world.item_vectors, max_batch=8) for _ in range(LANES)]
    lanes = cpu_lanes(artifact, scorers, max_batch=8)
    engine = SearchEngine(artifact, lanes, max_batch=8, max_k=1000)

    def users(split: str, seed: int, count: int) -> UserSet:
        rng = np.random.default_rng(seed)
        histories = [rng.choice(world.item_ids, 5, replace=False).tolist() for _ in range(count)]
        found = EvalUsers(split, histories, rng.choice(world.item_ids, count).tolist())  # type: ignore[arg-type]
        return UserSet.of(found, engine, world.item_ids)

    return Corpus(
        name="world",
        work=directory / "work",
        options=CorpusOptions(k=K, lanes=LANES, max_batch=8),
        k=K,
        artifact=artifact,
        nann_artifact=artifact,
        engines={OWN_GRAPH: engine, NANN_GRAPH: engine},
        rerankers=tuple(Reranker(backend, scorer) for backend, scorer in lanes),
        tune=users("validation", 1, 9),
        test=users("test", 2, 13),
        multiply_adds=MultiplyAdds(score=8.0, encode=16.0),
        content="0" * 20,
    )
