"""The graph builder: faiss' lists in NANN's arrays, nothing lost and nothing invented."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from nann.offline.builders.hnsw import MIN_ENTRY_POINTS, build_hnsw, prepare_vectors, to_ragged

N, D = 3000, 8


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)


def _faiss_lists(index: Any, level: int) -> list[list[int]]:
    """Neighbour lists as faiss' own accessors give them, one item at a time."""
    flat = faiss.vector_to_array(index.hnsw.neighbors)
    lists = []
    for item, levels in enumerate(faiss.vector_to_array(index.hnsw.levels)):
        begin = index.hnsw.offsets.at(item) + index.hnsw.cum_nb_neighbors(level)
        row = flat[begin : begin + index.hnsw.nb_neighbors(level)] if levels > level else []
        lists.append([int(node) for node in row if node >= 0])
    return lists


@pytest.mark.parametrize("level", [0, 1])
def test_tables_hold_the_lists_that_faiss_built(embeddings: np.ndarray, level: int) -> None:
    index = faiss.IndexHNSWFlat(D, 32)
    index.add(embeddings)  # NANN's own call: L2, M 32, efConstruction and seed left at faiss' defaults

    graph = build_hnsw(embeddings, m=32, ef_construction=40, space="l2")

    table = graph.neighbors[level]
    assert table.dtype == np.int32
    assert table.shape == (N, 64 if level == 0 else 32)
    assert [[int(n) for n in row if n >= 0] for row in table] == _faiss_lists(index, level)
    padding = table < 0
    assert bool(np.all(padding[:, 1:] >= padding[:, :-1])), "padding belongs at the end of a row"


def test_entry_points_are_nanns(embeddings: np.ndarray) -> None:
    index = faiss.IndexHNSWFlat(D, 32)
    index.add(embeddings)
    graph = build_hnsw(embeddings, m=32, ef_construction=40, space="l2")
    nann = np.flatnonzero(faiss.vector_to_array(index.hnsw.levels) > 2)
    assert 0 < len(nann) < MIN_ENTRY_POINTS
    np.testing.assert_array_equal(graph.entry_points, nann)
    assert graph.entry_points.dtype == np.int64


def test_few_entry_points_are_filled_up_from_the_next_lower_level_in_order(embeddings: np.ndarray) -> None:
    graph = build_hnsw(embeddings, m=32, ef_construction=40, space="l2")
    own = len(graph.entry_points)
    level_1 = np.flatnonzero(graph.item_levels == 1)
    assert len(level_1) > MIN_ENTRY_POINTS - own
    np.testing.assert_array_equal(graph.walk_entry_points[:own], graph.entry_points)
    np.testing.assert_array_equal(graph.walk_entry_points[own:], level_1[: MIN_ENTRY_POINTS - own])


def test_a_tiny_corpus_is_entered_everywhere(embeddings: np.ndarray) -> None:
    graph = build_hnsw(embeddings[:40], m=16)
    np.testing.assert_array_equal(np.sort(graph.walk_entry_points), np.arange(40))
    assert len(build_hnsw(embeddings[:1]).walk_entry_points) == 1


def test_enough_entry_points_stay_as_they_are(embeddings: np.ndarray) -> None:
    graph = build_hnsw(embeddings, m=4, ef_construction=40)
    assert len(graph.entry_points) >= MIN_ENTRY_POINTS
    np.testing.assert_array_equal(graph.walk_entry_points, graph.entry_points)


def test_the_same_seed_gives_the_same_graph_on_any_number_of_threads(embeddings: np.ndarray) -> None:
    one, two = (build_hnsw(embeddings, seed=7, num_threads=threads) for threads in (1, 2))
    for level in (0, 1):
        np.testing.assert_array_equal(one.neighbors[level], two.neighbors[level])
    np.testing.assert_array_equal(one.item_levels, two.item_levels)
    assert bool(np.any(one.item_levels != build_hnsw(embeddings, seed=8).item_levels))


def test_cosine_ignores_the_length_of_a_vector(embeddings: np.ndarray) -> None:
    scale = np.exp2(np.random.default_rng(0).integers(-3, 4, (N, 1))).astype(np.float32)
    plain, scaled = build_hnsw(embeddings, space="cosine"), build_hnsw(embeddings * scale, space="cosine")
    np.testing.assert_array_equal(plain.neighbors[0], scaled.neighbors[0])
    l2 = build_hnsw(embeddings * scale, space="l2")
    assert bool(np.any(plain.neighbors[0] != l2.neighbors[0]))


def test_inner_product_links_to_long_vectors(embeddings: np.ndarray) -> None:
    stretched = embeddings.copy()
    stretched[:10] *= 20
    by_ip = build_hnsw(stretched, space="ip", ef_construction=40).neighbors[0]
    assert float(np.mean((by_ip >= 0) & (by_ip < 10))) > 2 * 10 / N


def test_ragged_rows_are_the_padded_ones() -> None:
    table = np.array([[3, 1, -1], [-1, -1, -1], [0, 1, 2]], np.int32)
    values, row_splits = to_ragged(table)
    assert (values.dtype, row_splits.dtype) == (np.int64, np.int64)
    assert values.tolist() == [3, 1, 0, 1, 2]
    assert row_splits.tolist() == [0, 2, 2, 5]


def test_a_zero_vector_stays_zero_in_cosine_space() -> None:
    vectors = prepare_vectors(np.array([[3, 4], [0, 0]], np.float32), "cosine")
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((0, 4), np.float32), "non-empty"),
        (np.zeros((4, 4)), "float64"),
        (np.array([[0, 1], [np.nan, 1]], np.float32), "row 1"),
    ],
)
def test_unusable_embeddings_are_refused(bad: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_hnsw(bad)


def test_unusable_options_are_refused(embeddings: np.ndarray) -> None:
    with pytest.raises(ValueError, match="m must be"):
        build_hnsw(embeddings, m=1)
    with pytest.raises(ValueError, match="cosine, l2, ip"):
        build_hnsw(embeddings, space="manhattan")  # type: ignore[arg-type]
