"""Every Backend against plain Python: random sequences of the primitives that a search is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from engine_world import random_table
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_kernels import ReferencePool, first_sights
from registry import BACKENDS

from nann.engine.backend import Admission, Candidates, Frontier
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
        },
        "max_batch": MAX_BATCH,
        "max_pairs": MAX_PAIRS,
    }


@pytest.fixture(scope="module", params=BACKENDS)
def make(request):
    return BACKENDS[request.param]


def rows_of(candidates: Candidates) -> list[list[int]]:
    splits = candidates.row_splits
    return [candidates.item_index[a:b].tolist() for a, b in pairwise(splits)]


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
def test_any_sequence_of_primitives_equals_the_reference(make, data) -> None:
    given_tables = tables(data.draw(st.integers(0, 5)))
    backend = make(**given_tables)
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
        for _ in range(data.draw(st.integers(1, 4))):
            assert rows_of(candidates) == expected
            total = int(candidates.row_splits[-1])
            scores = np.array(data.draw(st.lists(SCORES, min_size=total, max_size=total)), np.float32)
            stage = {
                "keep": data.draw(st.sampled_from([1, 4, NO_LIMIT])),
                "capacity": data.draw(st.sampled_from([2, 5, 20])),
                "width": data.draw(st.integers(0, 6)),
                "forget": data.draw(st.booleans()),
            }
            frontier = backend.merge_beam(beam, candidates, scores, **stage)
            chosen = []
            for b, query in enumerate(wanted):
                part = slice(candidates.row_splits[b], candidates.row_splits[b + 1])
                chosen.append(query.merge(expected[b], scores[part].tolist(), **stage))
            assert [frontier.item_index[b, : frontier.count[b]].tolist() for b in range(batch)] == chosen
            level = data.draw(st.integers(0, 1))
            candidates = backend.expand(beam, frontier, level)
            expected = [q.expand(row, level) for q, row in zip(wanted, chosen, strict=True)]
        assert rows_of(candidates) == expected
        assert beam.nonfinite.tolist() == [query.pool.nonfinite for query in wanted]
        ks = [data.draw(st.integers(0, 25)) for _ in range(batch)]
        for b, (items, scores) in enumerate(backend.to_host(beam, ks)):
            assert items.dtype == np.int32 and scores.dtype == np.float32
            assert list(zip(scores.tolist(), items.tolist(), strict=True)) == wanted[b].best(ks[b])
            rest = backend.unvisited(beam, b)
            assert rest.tolist() == sorted(set(range(NUM_ITEMS)) - wanted[b].visited)


@EXAMPLES
@given(counts=st.lists(st.integers(0, 150), min_size=1, max_size=MAX_BATCH), seed=st.integers(0, 99))
def test_gather_copies_every_candidate_to_its_row_and_zeroes_the_rest(make, counts, seed) -> None:
    given_tables = tables()
    backend = make(**given_tables)
    rng = np.random.default_rng(seed)
    items = rng.integers(0, NUM_ITEMS, sum(counts)).astype(np.int32)
    candidates = Candidates(items, np.cumsum([0, *counts]).astype(np.int32))
    grid = BucketGrid(max_batch=MAX_BATCH, max_rows=MAX_PAIRS)
    for plan in grid.plan(candidates.row_splits.tolist()):
        tiles = backend.gather(candidates, plan)
        owner = np.full(plan.shape.pairs, -1)
        source = np.full(plan.shape.pairs, -1)
        for segment in plan.segments:
            n = segment.stop - segment.start
            owner[segment.row : segment.row + n] = segment.query
            source[segment.row : segment.row + n] = items[segment.start : segment.stop]
        for name, table in given_tables["item_state"].items():
            wanted = np.where((source >= 0).reshape(-1, *[1] * (table.ndim - 1)), table[source], 0)
            found = np.asarray(tiles.items[name])
            assert found.dtype == table.dtype
            assert found.shape == (plan.shape.tiles, plan.shape.rows, *table.shape[1:])
            np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
        per_tile = owner.reshape(plan.shape.tiles, plan.shape.rows)
        for tile, query in zip(per_tile, np.asarray(tiles.tile_query), strict=True):
            assert set(tile[tile >= 0].tolist()) <= {int(query)}
        assert np.asarray(tiles.tile_query).dtype == np.int32


def test_an_empty_frontier_has_no_neighbours(make) -> None:
    backend = make(**tables())
    beam = backend.begin(2, with_answer=[None, None])
    frontier = Frontier(np.zeros((2, 3), np.int32), np.zeros(2, np.int32))
    assert rows_of(backend.expand(beam, frontier, 0)) == [[], []]


def test_nothing_is_left_of_the_search_before(make) -> None:
    backend = make(**tables())
    for _ in range(2):
        beam = backend.begin(1, with_answer=[None])
        candidates = backend.seed(beam, [np.arange(10, dtype=np.int32)])
        assert rows_of(candidates) == [list(range(10))]
        backend.merge_beam(
            beam, candidates, np.ones(10, np.float32), keep=NO_LIMIT, capacity=5, width=2, forget=False
        )
        assert backend.to_host(beam, [9])[0][0].tolist() == [0, 1, 2, 3, 4]
        assert beam.nonfinite.tolist() == [0]
