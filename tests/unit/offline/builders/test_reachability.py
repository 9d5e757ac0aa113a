"""After a repair every item is reachable from every root set, and little else has changed."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nann.offline.builders.reachability import repair, unreachable_from


def _unreachable_one_by_one(table: np.ndarray, roots: np.ndarray) -> list[int]:
    seen = set(roots.tolist())
    queue = deque(seen)
    while queue:
        for node in table[queue.popleft()].tolist():
            if node >= 0 and node not in seen:
                seen.add(node)
                queue.append(node)
    return [node for node in range(len(table)) if node not in seen]


def _random_graph(seed: int, n: int, degree: int, filled: float) -> tuple[np.ndarray, np.ndarray]:
    """A table with padded rows of distinct neighbours (no item its own), and vectors of its items."""
    rng = np.random.default_rng(seed)
    table = np.full((n, degree), -1, np.int32)
    for node in range(n):
        others = rng.permutation(np.delete(np.arange(n), node))[: rng.binomial(min(degree, n - 1), filled)]
        table[node, : len(others)] = others
    return table, rng.standard_normal((n, 3)).astype(np.float32)


graphs = st.builds(
    _random_graph, st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(2, 5), st.floats(0, 1)
)


@settings(deadline=None, max_examples=60)
@given(graphs)
def test_the_walk_finds_what_a_plain_walk_finds(graph: tuple[np.ndarray, np.ndarray]) -> None:
    roots = np.array([1, 0, 1])
    assert unreachable_from(graph[0], roots).tolist() == _unreachable_one_by_one(graph[0], roots)


@settings(deadline=None, max_examples=100)
@given(graphs, st.sampled_from(["l2", "ip", "cosine"]), st.data())
def test_everything_is_reachable_from_every_root_set_after_a_repair(
    graph: tuple[np.ndarray, np.ndarray], space: str, data: st.DataObject
) -> None:
    table, vectors = graph
    nodes = st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=4)
    root_sets = [np.array(data.draw(nodes)) for _ in range(2)]
    original = table.copy()

    report = repair(table, vectors, root_sets, space)  # type: ignore[arg-type]

    np.testing.assert_array_equal(table, original)
    for roots in root_sets:
        assert _unreachable_one_by_one(report.neighbors, roots) == []
    assert report.unreachable_before[0] == len(_unreachable_one_by_one(table, root_sets[0]))
    assert int(np.count_nonzero(report.neighbors != table)) <= report.edges_added + report.edges_replaced
    added = np.count_nonzero(report.neighbors >= 0) - np.count_nonzero(table >= 0)
    assert added == report.edges_added
    padding = report.neighbors < 0
    assert bool(np.all(padding[:, 1:] >= padding[:, :-1]))
    for node, row in enumerate(report.neighbors.tolist()):
        present = [other for other in row if other >= 0]
        assert len(present) == len(set(present)), "a repaired row names a neighbour twice"
        assert node not in present


def test_a_connected_graph_is_left_alone() -> None:
    ring = np.array([[1, 3], [2, 0], [3, 1], [0, 2]], np.int32)
    report = repair(ring, np.eye(4, dtype=np.float32), [np.array([2])], "l2")
    np.testing.assert_array_equal(report.neighbors, ring)
    assert (report.unreachable_before, report.edges_added, report.edges_replaced) == ((0,), 0, 0)


def test_a_lost_item_is_linked_from_its_nearest_reachable_one() -> None:
    vectors = np.array([[0.0], [1.0], [2.0], [2.1]], np.float32)
    table = np.array([[1, 2], [0, -1], [0, -1], [2, -1]], np.int32)  # nothing leads to 3
    report = repair(table, vectors, [np.array([0])], "l2")
    assert report.neighbors[2].tolist() == [0, 3]
    assert (report.unreachable_before, report.edges_added, report.edges_replaced) == ((1,), 1, 0)


def test_the_longest_edge_that_nothing_depends_on_makes_room() -> None:
    vectors = np.array([[0.0], [1.0], [5.0], [0.9]], np.float32)
    # 3 is nearest to 1, whose row is full: its edge to 2 is longer than the one to 0, and 0 leads to 2.
    table = np.array([[1, 2], [0, 2], [0, 1], [1, 0]], np.int32)
    report = repair(table, vectors, [np.array([0])], "l2")
    assert report.neighbors[1].tolist() == [0, 3]
    assert (report.edges_added, report.edges_replaced) == (0, 1)


def test_one_edge_is_enough_for_a_group_that_hangs_together() -> None:
    vectors = np.arange(6, dtype=np.float32)[:, None]
    table = np.array([[1, -1], [0, -1], [3, -1], [4, -1], [5, -1], [2, -1]], np.int32)
    report = repair(table, vectors, [np.array([0])], "l2")
    assert report.unreachable_before == (4,)
    assert report.edges_added == 1


def test_an_empty_root_set_is_refused() -> None:
    with pytest.raises(ValueError, match="root set"):
        repair(np.zeros((2, 2), np.int32), np.zeros((2, 1), np.float32), [np.array([], np.int64)], "l2")
