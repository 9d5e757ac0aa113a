"""Indexes over inner products, alone and with the model behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nann.offline.benchmark.compare import rivals
from nann.offline.benchmark.compare.contender import Setting, Skipped
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import SWEEPS, EngineContender
from nann.offline.benchmark.compare.indexes import INDEXES, FaissHnsw, FaissIvf, HnswlibHnsw
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.quality import exhaustive_truth, measure
from nann.offline.benchmark.compare.rivals import IndexContender, index_contenders, rerank_settings
from nann.offline.benchmark.compare.vectors import VectorSource, embedding_vectors

ALL = 300


@pytest.fixture
def source(corpus: Corpus) -> VectorSource:
    found = embedding_vectors(corpus.artifact)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_with_enough_effort_finds_the_nearest(
    kind: type, corpus: Corpus, source: VectorSource, tmp_path: Path
) -> None:
    if kind.__name__ == "HnswlibHnsw":
        pytest.importorskip("hnswlib")
    index = kind(source.items, tmp_path)
    users = source.of_users(corpus.test.histories)
    effort = dict.fromkeys(index.efforts(ALL)[0], ALL)
    found = index.search(users, 5, effort)
    products = users @ source.items.T
    best = np.sort(products, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(np.take_along_axis(products, found, axis=1), best, atol=1e-5)
    again = kind(source.items, tmp_path)  # from its file
    np.testing.assert_array_equal(again.search(users, 5, effort), found)
    assert 0 < index.count_products(users, 5, effort) <= 2 * ALL


def test_hnswlib_answers_with_what_it_reaches(tmp_path: Path) -> None:
    """Of two far clusters, asked for more than either has."""
    pytest.importorskip("hnswlib")
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.normal(size=(1500, 8)), 50 + rng.normal(size=(1500, 8))]).astype(np.float32)
    found = HnswlibHnsw(items, tmp_path).search(items[:3], 2500, {"ef_search": 2500})
    assert found.shape == (3, 2500)
    reached = (found >= 0).sum(axis=1)
    assert (reached < 2500).all()
    assert (reached > 1000).all()
    for row in found:
        assert len(np.unique(row[row >= 0])) == (row >= 0).sum()


def test_an_inverted_file_counts_its_lists_and_what_they_hold(
    source: VectorSource, corpus: Corpus, tmp_path: Path
) -> None:
    index = FaissIvf(source.items, tmp_path)
    users = source.of_users(corpus.test.histories)
    lists = round(4 * ALL**0.5)
    assert index.count_products(users, 5, {"nprobe": lists}) == lists + ALL


def test_reranking_everything_is_the_exhaustive_search(
    corpus: Corpus, source: VectorSource, tmp_path: Path
) -> None:
    exhaustive = EngineContender(corpus, next(s for s in SWEEPS if s.policy == "exhaustive"))
    truth = exhaustive_truth(corpus, exhaustive, corpus.test)
    contender = IndexContender(corpus, source, FaissIvf(source.items, tmp_path), rerank=True)
    setting = Setting(contender.name, {"candidates": ALL, "nprobe": ALL})
    found = measure(corpus, contender, setting, corpus.test, truth)
    assert found.recall.min() == 1.0
    assert (found.n_scored == ALL).all()
    width = source.items.shape[1]
    lists = round(4 * ALL**0.5)
    expected = corpus.multiply_adds.encode + source.multiply_adds + (lists + ALL) * width
    np.testing.assert_allclose(found.multiply_adds, expected)


def test_an_index_alone_scores_nothing(corpus: Corpus, source: VectorSource, tmp_path: Path) -> None:
    contender = IndexContender(corpus, source, FaissHnsw(source.items, tmp_path), rerank=False)
    found = contender.answers(contender.settings[-1], corpus.test, corpus.k)
    assert {answer.n_scored for answer in found} == {0}
    assert all(answer.score is None and len(answer.item_index) == corpus.k for answer in found)
    budget = TimingBudget(requests=2, latency_s=100.0, load_s=0.0)
    rows = [0, 1, 2]
    assert len(contender.latencies_s(contender.settings[0], corpus.test, corpus.k, rows, budget)) == 2
    assert contender.saturated_qps(contender.settings[0], corpus.test, corpus.k, rows, budget) > 0


def test_how_many_are_reranked() -> None:
    assert rerank_settings(200, 226_337) == [1000, 2000, 5000, 10_000, 20_000]
    assert rerank_settings(200, 3706) == [1000, 2000]
    assert rerank_settings(10, 300) == []


def test_a_library_that_is_not_there_is_named(
    corpus: Corpus, source: VectorSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(items: np.ndarray, directory: Path) -> FaissHnsw:
        raise ModuleNotFoundError("No module named 'hnswlib'")

    monkeypatch.setattr(rivals, "INDEXES", (missing, FaissHnsw))
    found = list(index_contenders(corpus, source))
    assert isinstance(found[0], Skipped)
    assert "No module named 'hnswlib'" in found[0].reason
    assert [one.contender if isinstance(one, Skipped) else one.name for one in found[1:]] == [
        "faiss HNSW alone",
        "faiss HNSW + rerank",
    ]
    assert all(isinstance(one, Skipped) for one in index_contenders(corpus, None))
