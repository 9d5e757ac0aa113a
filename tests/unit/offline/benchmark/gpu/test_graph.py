from __future__ import annotations

import numpy as np
import pytest

from nann.offline.benchmark.gpu.corpus import make_corpus
from nann.offline.benchmark.gpu.edges import choose_all, link_unreached
from nann.offline.benchmark.gpu.graph import DEGREE, build_graph, find_near_items, link, reachable
from nann.offline.benchmark.gpu.neighbors import balanced_blocks, nearest_neighbors

VECTORS = make_corpus(5000, 1).embeddings


def exact_neighbors(vectors: np.ndarray, k: int) -> np.ndarray:
    distances = (vectors**2).sum(axis=1)[None] - 2 * vectors @ vectors.T
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("n", "size"), [(1, 4), (4, 4), (5, 4), (1000, 64), (1023, 64)])
def test_blocks_hold_every_row_once_and_are_of_one_size(n: int, size: int) -> None:
    blocks = balanced_blocks(VECTORS[:n], size)
    assert sorted(blocks[blocks >= 0].tolist()) == list(range(n))
    sizes = (blocks >= 0).sum(axis=1)
    assert sizes.max() <= size and sizes.max() - sizes.min() <= 1
    assert ((blocks >= 0) == (np.arange(blocks.shape[1]) < sizes[:, None])).all()


def test_blocks_are_of_near_rows() -> None:
    blocks = balanced_blocks(VECTORS, 512)
    within = np.mean([VECTORS[block[block >= 0]].var(axis=0).sum() for block in blocks])
    assert within < 0.75 * VECTORS.var(axis=0).sum()


@pytest.mark.parametrize("blocks_a_call", [1, 3])
def test_with_every_block_near_the_neighbours_are_nearly_all_found(blocks_a_call: int) -> None:
    found = nearest_neighbors(VECTORS, 20, near_blocks=99, blocks_a_call=blocks_a_call)
    exact = exact_neighbors(VECTORS, 20)
    shares = [len(np.intersect1d(a, b)) / 20 for a, b in zip(found, exact, strict=True)]
    assert np.mean(shares) > 0.98  # of 2,048 bins a few hold two of the twenty
    assert not (found == np.arange(5000)[:, None]).any()
    assert all(len(set(row)) == 20 for row in found.tolist())
    assert (found[:, 0] == exact[:, 0]).mean() > 0.99


def test_where_there_are_fewer_rows_there_are_fewer_neighbours() -> None:
    found = nearest_neighbors(VECTORS[:7], 20)
    assert ((found >= 0).sum(axis=1) == 6).all()
    assert (found[:, 6:] == -1).all()


def test_edges_lead_both_ways_and_none_is_an_item_s_own() -> None:
    table = link(VECTORS, exact_neighbors(VECTORS, 48).astype(np.int32))
    assert table.shape == (5000, DEGREE) and table.dtype == np.int32
    for item, row in enumerate(table.tolist()):
        known = [other for other in row if other >= 0]
        assert len(set(known)) == len(known) and item not in known
        assert row == known + [-1] * (DEGREE - len(known))
    forward = {(item, other) for item, row in enumerate(table.tolist()) for other in row if other >= 0}
    both = sum((b, a) in forward for a, b in forward) / len(forward)
    assert both > 0.8


def test_the_first_edges_point_in_different_directions() -> None:
    """On a line, an item's nearest on either side make all others of that side superfluous."""
    line = np.zeros((50, 64), np.float32)
    line[:, 0] = np.arange(50) ** 1.01
    table = link(line, exact_neighbors(line, 10).astype(np.int32))
    for item in range(1, 49):
        assert set(table[item, :2].tolist()) == {item - 1, item + 1}


def test_an_edge_in_another_direction_comes_before_nearer_ones_in_the_same() -> None:
    line = np.zeros((42, 64), np.float32)
    line[1:41, 0] = 1 + np.arange(40) / 100
    line[41, 0] = -3
    out = np.full((42, 4), -1, np.int32)
    choose_all(line, exact_neighbors(line, 41).astype(np.int32), out)
    assert out[0].tolist() == [1, 41, 2, 3]


def test_a_parent_gives_at_most_half_its_slots_to_the_unreached() -> None:
    table = np.full((50, 8), -1, np.int32)
    table[0] = np.arange(1, 9)
    near = np.zeros((50, 1), np.int32)
    reached = np.arange(50) < 9
    link_unreached(table, near, reached)
    assert table[0].tolist() == [1, 2, 3, 4, 12, 11, 10, 9]
    assert reached.tolist() == [item < 13 for item in range(50)]


def test_every_item_is_reached_from_the_entry_points() -> None:
    near = find_near_items(VECTORS)
    graph = build_graph(VECTORS, near)
    assert graph.unreachable == 0
    assert reachable(graph.neighbors[0], graph.entry_points).all()
    ground, above = graph.neighbors
    upper = near.upper
    assert set(np.flatnonzero((above >= 0).any(axis=1)).tolist()) <= set(upper.tolist())
    assert set(above[above >= 0].tolist()) <= set(upper.tolist())
    assert set(graph.entry_points.tolist()) <= set(upper.tolist())
    assert (above[upper] >= 0).any(axis=1).all() and (ground >= 0).any(axis=1).all()
    assert len(graph.entry_points) == 64


def test_two_islands_are_joined() -> None:
    near = find_near_items(VECTORS[:600])
    near.of_all[:300] = np.arange(1, 49)  # the first half knows only itself, and so does the second
    near.of_all[300:] = np.arange(301, 349)
    near.of_all[400, 0] = 5  # but for one list
    graph = build_graph(VECTORS[:600], near)
    assert graph.unreachable == 0


def test_what_no_list_names_is_counted() -> None:
    vectors = VECTORS[:600]
    near = find_near_items(vectors)
    near.of_all[:] = np.where(near.of_all == 7, 8, near.of_all)
    near.of_all[7] = -1
    graph = build_graph(vectors, near)
    assert graph.unreachable == (7 not in graph.entry_points)
