"""The grid of compiled shapes and how candidates are laid out in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nann.engine.scoring.buckets import MAX_ROWS, TILE_ROWS, BucketGrid, Shape

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)

counts_of_a_batch = st.lists(
    st.one_of(st.integers(0, 70), st.integers(0, 6000), st.sampled_from([0, 32, 64, 1024, 4096, 4097, 8192])),
    min_size=1,
    max_size=16,
)


def splits(counts: list[int]) -> list[int]:
    return np.cumsum([0, *counts]).tolist()


@EXAMPLES
@given(counts=counts_of_a_batch, max_rows=st.sampled_from([64, 96, 256, 1024, 1056, MAX_ROWS]))
def test_every_candidate_has_exactly_one_row_of_its_query(counts, max_rows) -> None:
    grid = BucketGrid(max_batch=len(counts), max_rows=max_rows)
    shapes = set(grid.shapes())
    offsets = splits(counts)
    scored = []
    for plan in grid.plan(offsets):
        assert plan.shape in shapes
        assert plan.shape.pairs <= grid.max_rows
        rows: list[int] = []
        tile_owner: dict[int, int] = {}
        for segment in plan.segments:
            assert offsets[segment.query] <= segment.start < segment.stop <= offsets[segment.query + 1]
            taken = range(segment.row, segment.row + segment.stop - segment.start)
            rows += taken
            for row in taken:
                assert tile_owner.setdefault(row // plan.shape.rows, segment.query) == segment.query
            scored += range(segment.start, segment.stop)
        assert len(rows) == len(set(rows))
        assert max(rows) < plan.shape.pairs
    assert sorted(scored) == list(range(offsets[-1]))


def test_nothing_to_score_is_no_call() -> None:
    grid = BucketGrid(max_batch=4)
    assert list(grid.plan([0])) == list(grid.plan([0, 0, 0])) == []


def test_one_query_alone_is_wide_even_in_a_batch() -> None:
    grid = BucketGrid(max_batch=4)
    (plan,) = grid.plan([0, 0, 100, 100, 100])
    assert plan.shape == Shape(1, 128)
    assert [segment.query for segment in plan.segments] == [1]


def test_several_queries_are_tiled_and_share_one_call() -> None:
    grid = BucketGrid(max_batch=4)
    (plan,) = grid.plan([0, 33, 33, 40])
    assert plan.shape == Shape(3, TILE_ROWS)
    assert [(s.query, s.start, s.stop, s.row) for s in plan.segments] == [(0, 0, 33, 0), (2, 33, 40, 64)]


@pytest.mark.parametrize(("count", "calls"), [(64, [64]), (65, [96]), (4096, [4096]), (4097, [4096, 64])])
def test_more_than_the_largest_shape_is_chunked(count, calls) -> None:
    assert [plan.shape.rows for plan in BucketGrid(max_batch=1).plan([0, count])] == calls


def test_tiled_work_over_the_largest_shape_is_chunked_in_full_tiles() -> None:
    grid = BucketGrid(max_batch=3, max_rows=256)
    plans = list(grid.plan(splits([300, 10, 200])))
    assert [(plan.shape.tiles, plan.shape.rows) for plan in plans] == [(1, 256), (8, 32), (2, 32)]
    assert [[s.query for s in plan.segments] for plan in plans] == [[0], [0, 1, 2], [2]]


def test_a_query_that_fills_the_widest_shape_is_wide_in_company_too() -> None:
    grid = BucketGrid(max_batch=3, max_rows=128)
    plans = list(grid.plan(splits([256, 128, 5])))
    assert [plan.shape for plan in plans] == [Shape(1, 128)] * 3 + [Shape(2, 32)]


def test_a_grid_without_wide_shapes_tiles_one_query_too() -> None:
    grid = BucketGrid(max_batch=1, max_rows=1024, tile_rows=64, wide=False)
    assert list(grid.shapes()) == [Shape(n, 64) for n in (4, 5, 6, 7, 8, 10, 12, 14, 16)]
    assert [grid.tiles_for(n) for n in (1, 4, 5, 9, 16)] == [4, 4, 5, 10, 16]
    assert [plan.shape.tiles for plan in grid.plan([0, 1100])] == [16, 4]


@pytest.mark.parametrize("max_rows", [64, 96, 512, 1024, 2048, MAX_ROWS])
def test_shapes_are_distinct_within_bounds_and_reach_the_largest(max_rows) -> None:
    for max_batch in (1, 2, 16):
        shapes = list(BucketGrid(max_batch=max_batch, max_rows=max_rows).shapes())
        assert len(shapes) == len(set(shapes))
        assert all(1 <= shape.pairs <= max_rows for shape in shapes)
        assert Shape(1, max_rows) in shapes
        assert (Shape(max_rows // TILE_ROWS, TILE_ROWS) in shapes) == (max_batch > 1)


@pytest.mark.parametrize("max_rows", [0, 32, 63, 65, 100, -64])
def test_a_largest_shape_that_is_no_whole_number_of_tiles_is_refused(max_rows) -> None:
    with pytest.raises(ValueError, match="tile_rows"):
        BucketGrid(max_batch=1, max_rows=max_rows)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_padding_stays_under_a_fifth_over_realistic_walks(batch) -> None:
    """A step of 64 expansions finds some 100 to 1,500 unvisited items (reference/search-findings.md)."""
    grid = BucketGrid(max_batch=batch)
    rng = np.random.default_rng(batch)
    scored = rows = 0
    for _ in range(600):
        counts = rng.integers(100, 1500, batch).tolist()
        for plan in grid.plan(splits(counts)):
            rows += plan.shape.pairs
        scored += sum(counts)
    assert 1 - scored / rows <= 0.20


def test_every_count_of_one_query_wastes_at_most_a_third_and_a_tenth_on_average() -> None:
    grid = BucketGrid(max_batch=1)
    waste = [
        1 - count / sum(plan.shape.pairs for plan in grid.plan([0, count]))
        for count in range(64, MAX_ROWS + 1)
    ]
    assert max(waste) <= 1 / 3
    assert np.mean(waste) <= 0.12
