from __future__ import annotations

from types import SimpleNamespace

import pytest

from nann.engine.scoring.buckets import BucketGrid
from nann.offline.benchmark.gpu.shapes import always_largest, padding, step_counts

GRID = BucketGrid(max_batch=4, max_rows=1024, tile_rows=32, wide=False)


def test_counts_are_of_steps_across_a_batch() -> None:
    scored = [[10, 20, 30], [1, 2], [5]]
    hits = [SimpleNamespace(explain={"scored_per_step": row}) for row in scored]
    assert step_counts(hits, 2) == [[10, 1], [20, 2], [30], [5]]


def test_padding_is_of_tiles_and_of_buckets() -> None:
    assert padding([[1024]], GRID) == 1
    assert padding([[64, 64]], GRID) == 1  # four tiles: the smallest bucket
    assert padding([[1, 1, 1, 1]], GRID) == 32
    assert padding([[1024, 32]], GRID) == pytest.approx((32 + 4) / 33)  # a whole call, and one of one tile


def test_every_step_takes_the_largest_bucket_inside_the_block() -> None:
    programs = SimpleNamespace(grid=GRID)
    with always_largest(programs):  # type: ignore[arg-type]
        assert programs.grid.tiles_for(1) == 32
        assert list(programs.grid.shapes()) == list(GRID.shapes())
    assert programs.grid is GRID
