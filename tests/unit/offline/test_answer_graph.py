"""What answers say of a graph, against plain Python, and the learnt graph as a part of an artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nann.offline.builders.nearest import join, reverse_lists
from nann.offline.co_answers import co_answered, most_answered


def by_hand(answers: np.ndarray, num_items: int, count: int) -> list[list[int]]:
    held = [set(row[row >= 0].tolist()) for row in answers]
    n = [sum(item in row for row in held) for item in range(num_items)]
    rows = []
    for item in range(num_items):
        together = {
            other: sum(item in row and other in row for row in held)
            for other in range(num_items)
            if other != item
        }
        strength = {
            other: np.float32(max(n[other], 1) ** -0.5) * shared
            for other, shared in together.items()
            if shared >= 2
        }
        rows.append(sorted(strength, key=lambda other: (-strength[other], other))[:count])
    return rows


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), users=st.integers(1, 30), k=st.integers(1, 6), count=st.integers(1, 8))
def test_links_are_the_items_answered_together(seed: int, users: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    answers = np.stack([rng.permutation(12)[:k] for _ in range(users)]).astype(np.int32)
    answers[rng.random(users) < 0.2, k // 2 :] = -1  # some answers are shorter
    found = co_answered(answers, 12, count)
    assert [[int(i) for i in row if i >= 0] for row in found] == by_hand(answers, 12, count)


def test_most_answered_counts_answers() -> None:
    answers = np.array([[3, 1, 2], [3, 2, -1], [3, -1, -1]], np.int32)
    assert most_answered(answers, 5, 2).tolist() == [3, 2]
    assert most_answered(answers, 5, 9).tolist() == [3, 2, 1]


def test_a_joined_row_has_no_item_twice_and_not_itself() -> None:
    first = np.array([[2, 0, -1], [0, -1, -1], [-1, -1, -1]], np.int32)
    second = np.array([[1, 2], [0, 2], [2, -1]], np.int32)
    assert join(first, second, 3).tolist() == [[2, 1, -1], [0, 2, -1], [-1, -1, -1]]
    assert join(first, second, 1).tolist() == [[2], [0], [-1]]


def test_reverse_lists_hold_who_has_an_item_nearest_first() -> None:
    lists = np.array([[1, 2], [2, 0], [1, 0]], np.int32)
    assert reverse_lists(lists, 2).tolist() == [[1, 2], [0, 2], [1, 0]]
    assert reverse_lists(lists, 1).tolist() == [[1], [0], [1]]


@pytest.mark.parametrize("nearest", [0, 3])
def test_a_graph_of_nearest_items_links_both_ways(nearest: int) -> None:
    from nann.offline.builders.hnsw import build_hnsw

    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    graph = build_hnsw(vectors, m=8, nearest=nearest)
    assert graph.nearest == nearest
    if nearest:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit.T), axis=1)[:, 1 : 1 + nearest]
        wanted = [set(row.tolist()) for row in order]
        for item, row in enumerate(order):
            for other in row:
                wanted[other].add(item)
        assert [set(row[row >= 0].tolist()) for row in graph.neighbors[0]] == wanted


def test_separate_topics_keep_the_links_that_hold_them_together(tmp_path: Path) -> None:
    """Near items alone leave each topic on its own: HNSW's links stay, and no learnt links replace them."""
    from nann.offline.build_index import GraphOptions, build_index

    rng = np.random.default_rng(0)
    topics = np.repeat(np.eye(100, dtype=np.float32), 6, axis=0)  # more than the 64 entry points reach
    embeddings = (topics + 0.01 * rng.normal(size=topics.shape)).astype(np.float32)
    np.save(tmp_path / "item_embs.npy", embeddings)
    np.save(tmp_path / "item_ids.npy", np.arange(600))
    report = build_index(tmp_path, tmp_path / "index", options=GraphOptions(m=8, nearest=4))
    assert report.graph["nearest"] == 0
    np.save(tmp_path / "item_embs.npy", rng.normal(size=(600, 8)).astype(np.float32))
    assert (
        build_index(tmp_path, tmp_path / "other", options=GraphOptions(m=8, nearest=4)).graph["nearest"] == 4
    )
