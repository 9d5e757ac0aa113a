"""`expand.cu` against NumPy: new items once each, visited from then on, and the plan of tiles."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, keys_of, program
from cuda_step import Step, graph

from nann.engine.cuda.modules import BlockSizes

I32, I64 = np.int32, np.int64


def expand(
    sizes: BlockSizes,
    neighbors: np.ndarray,
    frontiers: list[list[int]],
    visited: list[set[int]],
    *,
    width: int,
    tile_rows: int = 32,
    seed: int = 0,
) -> Step:
    num_items, degree = neighbors.shape
    step = Step(visited, num_items, min(num_items, width * degree))
    frontier = np.full((step.batch, width), 2**30, I32)  # a node that is not there, past each count
    for b, nodes in enumerate(frontiers):
        frontier[b, : len(nodes)] = nodes
    counts = [len(nodes) for nodes in frontiers]
    program("expand.cu", sizes).run(
        "expand",
        (-(-width * degree // sizes.expand_block), step.batch),
        sizes.expand_block,
        [
            *(neighbors, I32(degree), frontier, np.array(counts, I32), I32(width), step.bitmap),
            *(I64(step.words), step.items, I64(step.stride), I32(tile_rows), *step.plan()),
        ],
        shared_bytes=256,
        seed=seed,
    )
    near = [neighbors[nodes].ravel().tolist() for nodes in frontiers]
    step.check(near, tile_rows, counts)
    return step


def walk(sizes: BlockSizes, *, num_items: int, degree: int, batch: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, width + 1, batch)
    counts[rng.integers(batch)] = width  # at least one full
    frontiers = [rng.permutation(num_items)[:n].tolist() for n in np.minimum(counts, num_items)]
    visited = [set(rng.permutation(num_items)[: rng.integers(0, num_items)].tolist()) for _ in range(batch)]
    neighbors = graph(rng, num_items, degree)
    expand(sizes, neighbors, frontiers, visited, width=width, tile_rows=int(rng.choice([32, 64])), seed=seed)


@pytest.mark.parametrize("num_items", [1, 31, 32, 33, 130])
@pytest.mark.parametrize("seed", range(4))
def test_new_neighbours_once_each(num_items, seed) -> None:
    walk(SMALL, num_items=num_items, degree=7, batch=3, width=9, seed=seed)


@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 64), (2, 33), (40, 3), (64, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_batches_and_widths_around_the_block(batch, width, seed) -> None:
    walk(SMALL, num_items=100, degree=5, batch=batch, width=width, seed=seed)


@pytest.mark.parametrize(("degree", "width"), [(32, 8), (32, 64), (33, 31)])
def test_the_real_block(degree, width) -> None:
    walk(REAL, num_items=3001, degree=degree, batch=4, width=width, seed=degree + width)


@pytest.mark.parametrize("seed", range(6))
def test_an_item_that_every_node_of_the_frontier_has_comes_once(seed) -> None:
    neighbors = np.full((70, 4), 69, I32)
    neighbors[:, 0] = np.arange(70)
    step = expand(SMALL, neighbors, [list(range(40)), [5]], [set(), {69}], width=40, seed=seed)
    assert step.count.tolist() == [41, 1]


def test_empty_frontiers_leave_nothing_but_a_plan_of_nothing() -> None:
    step = expand(
        SMALL, graph(np.random.default_rng(0), 50, 6), [[], [], []], [{1}, set(), {2, 49}], width=11
    )
    assert step.report.tolist() == [0] * 6


def test_rows_of_padding_alone_give_nothing() -> None:
    step = expand(SMALL, np.full((40, 5), -1, I32), [[1, 2, 39], [0]], [set(), set()], width=8)
    assert step.report.tolist() == [0, 0, 3, 1]


def test_more_queries_than_threads_of_a_block_share_one_plan() -> None:
    walk(SMALL, num_items=64, degree=3, batch=70, width=4, seed=1)


@pytest.mark.parametrize("sizes", [SMALL, REAL])
@pytest.mark.parametrize("in_keys", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_seeds_are_listed_once_and_only_where_they_are_new(sizes, in_keys, seed) -> None:
    rng = np.random.default_rng(seed)
    batch, num_items, longest = 5, 75, 90
    rows = [rng.integers(0 if in_keys else -1, num_items, n).tolist() for n in (0, 1, 33, 64, longest)]
    rng.shuffle(rows)
    visited = [set(rng.permutation(num_items)[: rng.integers(0, 40)].tolist()) for _ in range(batch)]
    step = Step(visited, num_items, longest)
    flat = np.full((batch, longest), 2**30, I32)  # an item that is not there, past each count
    for b, row in enumerate(rows):
        flat[b, : len(row)] = row
    given = keys_of(rng.normal(size=flat.shape), flat).view(I32) if in_keys else flat
    counts, starts = np.array([len(row) for row in rows], I32), np.arange(batch, dtype=I32) * longest
    program("expand.cu", sizes).run(
        "seed",
        (-(-longest // sizes.expand_block), batch),
        sizes.expand_block,
        [
            *(given, starts, counts, I32(2 if in_keys else 1), I32(1 if in_keys else 0)),
            *(step.bitmap, I64(step.words), step.items, I64(step.stride), I32(32), *step.plan()),
        ],
        shared_bytes=256,
        seed=seed,
    )
    step.check(rows, 32, [0] * batch)
