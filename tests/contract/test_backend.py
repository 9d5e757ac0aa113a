"""Every Backend against plain Python: random sequences of the primitives that a search is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engine_world import random_table
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_kernels import ReferencePool, first_sights
from registry import BACKENDS, BackendCase

from nann.engine.backend import Admission
from nann.engine.errors import Unsupported
from nann.engine.scoring.buckets import BucketGrid

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
NUM_ITEMS, MAX_BATCH, MAX_PAIRS, NO_LIMIT = 130, 4, 256, 2**31 - 1
SCORES = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 1e-45]))


def tables(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "num_items": NUM_ITEMS,
        "neighbors": [random_table(rng, NUM_ITEMS, degree, np.arange(NUM_ITEMS)) for degree in (5, 3)],
        "item_state": {
            "item_a": rng.normal(size=(NUM_ITEMS, 8)).astype(np.float16),
            "item_b": rng.normal(size=(NUM_ITEMS, 2, 3)).astype(np.float32),
            "item_c": rng.normal(size=NUM_ITEMS).astype(np.float16),
            "item_number": np.arange(1, NUM_ITEMS + 1, dtype=np.float32),
        },
        "max_batch": MAX_BATCH,
        "max_pairs": MAX_PAIRS,
        "item_vectors": rng.integers(-2, 3, (NUM_ITEMS, 4)).astype(np.float32) * 0.5,
    }


@pytest.fixture(scope="module", params=BACKENDS)
def case(request) -> Iterator[BackendCase]:
    case = BACKENDS[request.param]
    with case.around():
        yield case


def score(
    case: BackendCase, backend: Any, candidates: Any, scores: np.ndarray, grid: BucketGrid | None = None
) -> None:
    """Take ``scores[query, item]`` as the answer to every tile; rows of padding answer NaN."""
    grid = grid or case.grid(max_batch=MAX_BATCH, max_rows=MAX_PAIRS)
    for tiles in backend.gather(candidates, grid):
        items = case.to_host(tiles.items["item_number"]).astype(np.int64) - 1
        queries = case.to_host(tiles.tile_query)[:, None]
        found = np.where(items >= 0, scores[queries, items], np.nan).astype(np.float32)
        backend.take_scores(candidates, tiles, case.to_device(found))


def admission(draw: Any) -> Admission | None:
    if draw(st.booleans()):
        return None
    mask = None
    if draw(st.booleans()):
        mask = np.random.default_rng(draw(st.integers(0, 99))).random(NUM_ITEMS) < 0.6
    excluded = np.array(sorted(draw(st.sets(st.integers(0, NUM_ITEMS - 1), max_size=20))), np.int32)
    admitted = np.ones(NUM_ITEMS, bool) if mask is None else mask.copy()
    admitted[excluded] = False
    return Admission(mask, excluded, int(admitted.sum()))


def admits(rule: Admission, item: int) -> bool:
    return (rule.mask is None or bool(rule.mask[item])) and item not in rule.excluded


class Reference:
    """One query of a batch in plain Python."""

    def __init__(self, neighbors: list[np.ndarray], rule: Admission | None) -> None:
        self.neighbors, self.rule = neighbors, rule
        self.visited: set[int] = set()
        self.pool, self.answer = ReferencePool(), ReferencePool()

    def expand(self, frontier: list[int], level: int) -> list[int]:
        around = (int(i) for node in frontier for i in self.neighbors[level][node] if i >= 0)
        return first_sights(around, self.visited)

    def merge(
        self, items: list[int], scores: list[float], *, keep: int, capacity: int, width: int, forget: bool
    ):
        self.pool.merge(items, scores, keep=keep, capacity=capacity)
        if self.rule is not None:
            allowed = [admits(self.rule, i) for i in items]
            self.answer.merge(items, scores, keep=keep, capacity=capacity, allowed=allowed)
        if forget:
            self.visited = {item for _, item in self.pool.ranked}
            self.pool.expanded = set()
        return self.pool.select(width)

    def best(self, k: int) -> list[tuple[float, int]]:
        if self.rule is None:
            return self.pool.ranked[:k]
        return list(dict.fromkeys(self.answer.ranked))[:k]


@EXAMPLES
@given(data=st.data())
def test_any_sequence_of_primitives_equals_the_reference(case, data) -> None:
    given_tables = tables(data.draw(st.integers(0, 5)))
    backend = case.make(**given_tables)
    for _ in range(data.draw(st.integers(1, 2))):  # a lane's scratch is used again
        batch = data.draw(st.integers(1, MAX_BATCH))
        rules = [admission(data.draw) for _ in range(batch)]
        wanted = [Reference(given_tables["neighbors"], rule) for rule in rules]
        beam = backend.begin(batch, with_answer=rules)
        assert beam.batch == batch
        item = st.integers(0, NUM_ITEMS - 1)
        starts = [data.draw(st.lists(item, max_size=9)) for _ in range(batch)]
        candidates = backend.seed(beam, [np.array(row, np.int32) for row in starts])
        expected = [first_sights(row, q.visited) for q, row in zip(wanted, starts, strict=True)]
        counts = [[len(row) for row in expected]]
        for _ in range(data.draw(st.integers(1, 4))):
            found = case.rows_of(candidates)
            assert [sorted(row) for row in found] == [sorted(row) for row in expected]
            scores = np.array(data.draw(st.lists(SCORES, min_size=batch * 16, max_size=batch * 16)))
            scores = np.resize(scores, (batch, NUM_ITEMS)).astype(np.float32)
            stage = {
                "keep": data.draw(st.sampled_from([1, 4, NO_LIMIT])),
                "capacity": data.draw(st.sampled_from([2, 5, 20])),
                "width": data.draw(st.integers(0, 6)),
                "forget": data.draw(st.booleans()),
            }
            score(case, backend, candidates, scores)
            backend.merge_beam(beam, candidates, **stage)
            chosen = [
                query.merge(expected[b], scores[b, expected[b]].tolist(), **stage)
                for b, query in enumerate(wanted)
            ]
            assert case.frontier_of(beam) == chosen
            level = data.draw(st.integers(0, 1))
            candidates = backend.expand(beam, level)
            expected = [q.expand(row, level) for q, row in zip(wanted, chosen, strict=True)]
            if candidates is None:
                assert not any(chosen)
                break
            assert any(chosen)
            counts.append([len(row) for row in expected])
        else:
            found = case.rows_of(candidates)
            assert [sorted(row) for row in found] == [sorted(row) for row in expected]
        ks = [data.draw(st.integers(0, 25)) for _ in range(batch)]
        answers = backend.to_host(beam, ks)
        assert beam.scored_per_step.tolist() == counts
        assert beam.nonfinite.tolist() == [query.pool.nonfinite for query in wanted]
        for b, (items, scores) in enumerate(answers):
            assert items.dtype == np.int32 and scores.dtype == np.float32
            assert list(zip(scores.tolist(), items.tolist(), strict=True)) == wanted[b].best(ks[b])
            rest = backend.unvisited(beam, b)
            assert rest.tolist() == sorted(set(range(NUM_ITEMS)) - wanted[b].visited)


@EXAMPLES
@given(counts=st.lists(st.integers(0, 150), min_size=1, max_size=MAX_BATCH), seed=st.integers(0, 99))
def test_gather_copies_every_candidate_to_one_row_and_zeroes_the_rest(case, counts, seed) -> None:
    given_tables = tables()
    backend = case.make(**given_tables)
    rng = np.random.default_rng(seed)
    beam = backend.begin(len(counts), with_answer=[None] * len(counts))
    rows = [rng.integers(0, NUM_ITEMS, count).astype(np.int32) for count in counts]
    candidates = backend.listed(beam, rows)
    grid = case.grid(max_batch=MAX_BATCH, max_rows=MAX_PAIRS)
    laid_out: list[list[int]] = [[] for _ in counts]
    for tiles in backend.gather(candidates, grid):
        shape = tiles.shape
        assert shape in set(grid.shapes())
        owner = case.to_host(tiles.tile_query)
        assert owner.dtype == np.int32
        assert owner.shape == (shape.tiles,)
        source = case.to_host(tiles.items["item_number"]).astype(np.int64) - 1
        for name, table in given_tables["item_state"].items():
            found = case.to_host(tiles.items[name])
            assert found.dtype == table.dtype
            assert found.shape == (shape.tiles, shape.rows, *table.shape[1:])
            held = (source >= 0).reshape(*source.shape, *[1] * (table.ndim - 1))
            np.testing.assert_array_equal(found, np.where(held, table[source], 0))
        for tile in range(shape.tiles):
            laid_out[owner[tile]] += source[tile][source[tile] >= 0].tolist()
        backend.take_scores(
            candidates, tiles, case.to_device(np.zeros((shape.tiles, shape.rows), np.float32))
        )
    assert [sorted(row) for row in laid_out] == [sorted(row.tolist()) for row in rows]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_scan_of_ranges_ranks_every_item(case, batch) -> None:
    backend = case.make(**tables())
    rng = np.random.default_rng(batch)
    scores = rng.integers(-9, 9, (batch, NUM_ITEMS)).astype(np.float32)
    beam = backend.begin(batch, with_answer=[None] * batch)
    for start in range(0, NUM_ITEMS, 60):
        candidates = backend.listed(beam, [range(start, min(start + 60, NUM_ITEMS))] * batch)
        score(case, backend, candidates, scores)
        backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=NUM_ITEMS, width=0, forget=False)
    for b, (items, found) in enumerate(backend.to_host(beam, [NUM_ITEMS] * batch)):
        wanted = np.lexsort((np.arange(NUM_ITEMS), -scores[b]))
        assert items.tolist() == wanted.tolist()
        assert found.tolist() == scores[b, wanted].tolist()
    assert beam.scored_per_step.shape == (0, batch)
    assert backend.unvisited(beam, 0).size == NUM_ITEMS


@pytest.mark.parametrize("count", [1, 7, 40, NUM_ITEMS, NUM_ITEMS + 5])
@pytest.mark.parametrize("batch", [1, MAX_BATCH])
def test_the_nearest_items_are_those_of_the_largest_products(case, batch, count) -> None:
    """Few distinct directions, so that ties abound; they go to the lower item index."""
    given_tables = tables()
    backend = case.make(**given_tables)
    queries = np.eye(4, dtype=np.float32)[[3, 0, 2, 1]][:batch]
    beam = backend.begin(batch, with_answer=[None] * batch)
    candidates = backend.nearest(beam, queries, count)
    vectors = given_tables["item_vectors"]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    products = np.divide(vectors, norms, where=norms > 0, out=np.zeros_like(vectors)) @ queries.T
    for b, found in enumerate(case.rows_of(candidates)):
        wanted = np.lexsort((np.arange(NUM_ITEMS), -products[:, b]))[:count]
        assert sorted(found) == sorted(wanted.tolist())
        assert set(backend.unvisited(beam, b)) == set(range(NUM_ITEMS)) - set(found)
    assert beam.scored_per_step.tolist() == [[min(count, NUM_ITEMS)] * batch]


def test_without_item_vectors_there_is_no_scan(case) -> None:
    backend = case.make(**{**tables(), "item_vectors": None})
    beam = backend.begin(1, with_answer=[None])
    with pytest.raises(Unsupported, match="no item vectors"):
        backend.nearest(beam, np.ones((1, 4), np.float32), 3)


def test_without_a_frontier_there_is_nothing_to_expand(case) -> None:
    backend = case.make(**tables())
    beam = backend.begin(2, with_answer=[None, None])
    assert backend.expand(beam, 0) is None
    candidates = backend.seed(beam, [np.arange(3, dtype=np.int32), np.empty(0, np.int32)])
    score(case, backend, candidates, np.ones((2, NUM_ITEMS), np.float32))
    backend.merge_beam(beam, candidates, keep=9, capacity=9, width=0, forget=False)
    assert backend.expand(beam, 0) is None


def test_nothing_is_left_of_the_search_before(case) -> None:
    backend = case.make(**tables())
    for _ in range(2):
        beam = backend.begin(1, with_answer=[None])
        candidates = backend.seed(beam, [np.arange(10, dtype=np.int32)])
        assert [sorted(row) for row in case.rows_of(candidates)] == [list(range(10))]
        score(case, backend, candidates, np.ones((1, NUM_ITEMS), np.float32))
        backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=5, width=2, forget=False)
        assert backend.to_host(beam, [9])[0][0].tolist() == [0, 1, 2, 3, 4]
        assert beam.nonfinite.tolist() == [0]
        assert beam.scored_per_step.tolist() == [[10]]
