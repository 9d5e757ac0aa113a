"""Where inner-product vectors come from, and which are the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_world import World

from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import SWEEPS, EngineContender
from nann.offline.benchmark.compare.quality import Truth, exhaustive_truth
from nann.offline.benchmark.compare.vectors import (
    VectorSource,
    best_source,
    embedding_vectors,
    gate_vectors,
    listed_vectors,
    share_within,
    vector_sources,
)


def _truth(corpus: Corpus) -> Truth:
    exhaustive = EngineContender(corpus, next(s for s in SWEEPS if s.policy == "exhaustive"))
    return exhaustive_truth(corpus, exhaustive, corpus.tune)


def _perfect(world: World) -> VectorSource:
    def of_users(histories: np.ndarray) -> np.ndarray:
        known = [world.item_vectors[row[row >= 0]].astype(np.int64).sum(axis=0) for row in histories]
        return (np.stack(known) % 7 - 3).astype(np.float32)

    return VectorSource("perfect", world.item_vectors.astype(np.float32), of_users, 0.0)


def test_the_model_itself_is_the_best_source(corpus: Corpus, world: World) -> None:
    wanted = _truth(corpus).item_index
    embeddings = embedding_vectors(corpus.artifact)
    assert embeddings is not None
    chosen, shares = best_source([embeddings, _perfect(world)], corpus.tune, wanted)
    assert chosen is not None
    assert chosen.name in shares
    assert share_within(_perfect(world), corpus.tune, wanted, 100) == 1.0
    assert share_within(embeddings, corpus.tune, wanted, 20) < 1.0
    assert best_source([], corpus.tune, wanted) == (None, {})


def test_a_user_is_the_mean_of_unit_vectors(corpus: Corpus) -> None:
    source = embedding_vectors(corpus.artifact)
    assert source is not None
    history = np.array([[3, 5, -1, -1, -1, -1], [-1] * 6], dtype=np.int32)
    expected = (source.items[3] + source.items[5]) / 2
    np.testing.assert_allclose(source.of_users(history), [expected, np.zeros_like(expected)], atol=1e-6)
    lengths = np.linalg.norm(source.items, axis=1)
    np.testing.assert_allclose(lengths[lengths > 0], 1.0, atol=1e-6)


def test_gate_tables_become_vectors(corpus: Corpus) -> None:
    assert gate_vectors(corpus.artifact) is None
    rng = np.random.default_rng(0)
    keys, queries = (rng.normal(size=(corpus.num_items, 4)).astype(np.float16) for _ in range(2))
    source = gate_vectors(replace(corpus.artifact, gate_keys=keys, gate_queries=queries))
    assert source is not None
    user = source.of_users(np.array([[1, 2, -1]], dtype=np.int32))[0]
    assert user[0] == 1.0  # the item's bias counts once, the user's ranks nothing
    np.testing.assert_allclose(user[1:], keys[[1, 2], 1:].astype(np.float32).mean(axis=0), rtol=1e-6)


def test_listed_vectors_are_found_by_history(tmp_path: Path, corpus: Corpus) -> None:
    directory = tmp_path / "vectors" / "two-tower"
    directory.mkdir(parents=True)
    np.save(directory / "items.npy", np.ones((corpus.num_items, 2)))
    np.save(directory / "users.npy", np.arange(18.0).reshape(9, 2))
    np.save(directory / "histories.npy", corpus.tune.histories)
    (source,) = [one for one in vector_sources(corpus.artifact, tmp_path) if one.name == "two-tower"]
    np.testing.assert_array_equal(source.of_users(corpus.tune.histories[[4, 0]]), [[8, 9], [0, 1]])
    with pytest.raises(ValueError, match="no vector for a history"):
        listed_vectors(directory).of_users(corpus.test.histories)
