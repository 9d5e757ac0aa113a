from __future__ import annotations

import numpy as np
import pytest

from nann.offline.benchmark.gpu.corpus import HISTORY_LENGTH, make_corpus


def test_a_seed_makes_one_corpus() -> None:
    one, same, other = make_corpus(3000, 20), make_corpus(3000, 20), make_corpus(3000, 20, seed=1)
    for field in ("embeddings", "weights", "history"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
        assert not np.array_equal(getattr(one, field), getattr(other, field))


def test_users_do_not_change_the_items() -> None:
    assert np.array_equal(make_corpus(3000, 1).embeddings, make_corpus(3000, 50).embeddings)


def test_histories_are_rows_and_then_padding() -> None:
    corpus = make_corpus(5000, 200)
    assert corpus.history.shape == (200, HISTORY_LENGTH)
    lengths = (corpus.history >= 0).sum(axis=1)
    assert ((corpus.history >= 0) == (np.arange(HISTORY_LENGTH) < lengths[:, None])).all()
    assert lengths.min() >= 10 and (lengths == HISTORY_LENGTH).mean() > 0.5 and len(set(lengths)) > 5
    assert corpus.history.max() < 5000


def test_items_come_in_clusters_and_users_have_several_interests() -> None:
    corpus = make_corpus(20_000, 50)
    items = corpus.embeddings
    assert 0.5 < np.linalg.norm(items, axis=1).mean() < 2
    rng = np.random.default_rng(0)
    chance = np.linalg.norm(items[rng.integers(0, 20_000, 500)] - items[rng.integers(0, 20_000, 500)], axis=1)
    shares = []
    for row in corpus.history:
        own = items[row[row >= 0]]
        distances = np.linalg.norm(own[:, None] - own[None], axis=2)[np.triu_indices(len(own), 1)]
        shares.append((distances < np.percentile(chance, 5)).mean())
    # Many pairs of a history are near, as chance pairs are not; many are not: one interest would give one.
    assert 0.2 < np.mean(shares) < 0.9


def test_popularity_is_a_distribution_with_a_head() -> None:
    weights = make_corpus(4000, 1).weights
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    assert np.sort(weights)[-40:].sum() > 0.05


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 256 items, not 255"):
        make_corpus(255, 1)
