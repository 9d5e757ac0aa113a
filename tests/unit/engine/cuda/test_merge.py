"""`merge.cu` against NumPy: pools, frontiers, visited bitmaps and non-finite scores, over several steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, Device, bitmaps, items_of, keys_of, program, sets

from nann.engine.cuda.beam import unpack
from nann.engine.cuda.launches import Launches
from nann.engine.cuda.modules import BlockSizes, Modules

I32, I64, U64 = np.int32, np.int64, np.uint64
NO_LIMIT = 2**31 - 1
TILE_ROWS = 32


@dataclass
class Query:
    """One query of the reference: arrays of keys, the lowest bit of which says expanded."""

    visited: set[int]
    admissible: set[int] | None
    pool: np.ndarray = field(default_factory=lambda: np.empty(0, U64))
    answer: np.ndarray = field(default_factory=lambda: np.empty(0, U64))
    frontier: list[int] = field(default_factory=list)
    frontier_score: list[float] = field(default_factory=list)
    nonfinite: int = 0

    def merge(self, items, scores, *, keep: int, capacity: int, width: int, forget: bool) -> None:
        finite = np.isfinite(scores)
        self.nonfinite += int((~finite).sum())
        keys = keys_of(scores[finite], items[finite])
        self.pool = _joined(self.pool, keys, keep, capacity)
        if self.admissible is not None:
            allowed = np.isin(items[finite], list(self.admissible))
            self.answer = _joined(self.answer, keys[allowed], keep, capacity)
        if forget:
            self.pool &= ~U64(1)
            self.visited = set(items_of(self.pool).tolist())
        chosen = np.flatnonzero(self.pool & U64(1) == 0)[:width]
        self.frontier = items_of(self.pool[chosen]).tolist()
        self.frontier_score = unpack(self.pool[chosen])[1].tolist()
        self.pool[chosen] |= U64(1)


def _joined(pool: np.ndarray, keys: np.ndarray, keep: int, capacity: int) -> np.ndarray:
    return np.sort(np.concatenate([pool, np.sort(keys)[:keep]]))[:capacity]


class Lane:
    """The kernel's memory, and the reference beside it."""

    def __init__(self, sizes: BlockSizes, queries: list[Query], num_items: int) -> None:
        self.sizes, self.queries = sizes, queries
        self.batch, self.words = len(queries), -(-num_items // 32)
        self.filtered = np.array([q.admissible is not None for q in queries], I32)
        self.n_pools = 2 if self.filtered.any() else 1
        self.visited = bitmaps([q.visited for q in queries], self.words)
        self.admissible = bitmaps([q.admissible or set() for q in queries], self.words)
        self.pools = np.zeros((self.n_pools, self.batch, 0), U64)
        self.pool_sizes = np.zeros((self.n_pools, self.batch), I32)
        self.nonfinite = np.zeros(self.batch, U64)

    def merge(
        self,
        rows: list[np.ndarray] | range,
        scores: list[np.ndarray],
        *,
        keep: int,
        capacity: int,
        width: int,
        forget: bool = False,
        layout: str = "strided",
        room: int | None = None,
        seed: int = 0,
    ) -> None:
        """One launch, and the same in the reference; they agree."""
        batch = self.batch
        counts = np.array([len(row) for row in scores], I32)
        longest = max(1, int(counts.max(initial=0)))
        most = Launches(Modules(self.sizes), None).room_for(longest, keep=keep, capacity=capacity)
        room = most if room is None else room
        arguments = self._layout(rows, scores, counts, longest, layout)
        if forget:
            self.visited[...] = 0
        old = self.pools if self.pools.size else np.zeros((1, 1, 1), U64)
        new = np.zeros((self.n_pools, batch, capacity), U64)
        spill = np.zeros((self.n_pools, batch, room) if room > self.sizes.sort_piece else 1, U64)
        frontier = np.full((batch, max(width, 1)), -5, I32)
        frontier_score = np.full((batch, max(width, 1)), np.nan, np.float32)
        frontier_count = np.full(batch, -5, I32)
        with Device() as device:
            device.run(
                program("merge.cu", self.sizes)["merge"],
                (batch, self.n_pools),
                self.sizes.merge_block,
                [
                    *(*arguments, old, I32(self.pools.shape[2]), new, I32(capacity), I32(keep)),
                    *(self.pool_sizes, self.filtered, self.admissible, self.visited, I64(self.words)),
                    *(I32(forget), frontier, frontier_score, frontier_count, I32(width)),
                    *(self.nonfinite, spill, I32(room)),
                ],
                shared_bytes=256 + 8 * min(room, self.sizes.sort_piece),
                seed=seed,
            )
        self.pools = new
        for b, query in enumerate(self.queries):
            items = np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows[b]
            query.merge(items, scores[b], keep=keep, capacity=capacity, width=width, forget=forget)
            assert frontier[b, : frontier_count[b]].tolist() == query.frontier
            assert frontier_score[b, : frontier_count[b]].tolist() == query.frontier_score
        self.check()

    def _layout(self, rows, scores, counts, longest: int, layout: str) -> list:
        """The first nine arguments, for one of the ways candidates and scores may lie."""
        batch = self.batch
        tile_start = np.cumsum([0, *-(-counts // TILE_ROWS)]).astype(I32)
        by_tile = np.full(max(1, int(tile_start[-1])) * TILE_ROWS, np.nan, np.float32)
        by_query = np.full((batch, longest), np.nan, np.float32)
        for b, row in enumerate(scores):
            by_tile[tile_start[b] * TILE_ROWS :][: row.size] = row
            by_query[b, : row.size] = row
        if layout == "range":
            return [by_query, None, I64(longest), None, None, I64(0), I32(rows.start), None, I32(len(rows))]
        if layout == "strided":
            strided = np.full((batch, longest), 2**30, I32)
            for b, row in enumerate(rows):
                strided[b, : row.size] = row
            items, item_start, stride = strided, None, longest
        else:
            items, stride = np.concatenate([*rows, np.zeros(1, I32)]).astype(I32), 0
            item_start = np.cumsum([0, *counts])[:-1].astype(I64)
        return [by_tile, tile_start, I64(TILE_ROWS), items, item_start, I64(stride), I32(0), counts, I32(0)]

    def check(self) -> None:
        for b, query in enumerate(self.queries):
            assert self.pools[0, b, : self.pool_sizes[0, b]].tolist() == query.pool.tolist()
            if query.admissible is not None:
                assert self.pools[1, b, : self.pool_sizes[1, b]].tolist() == query.answer.tolist()
        assert self.nonfinite.tolist() == [query.nonfinite for query in self.queries]
        assert sets(self.visited) == [query.visited for query in self.queries]


def lane(
    sizes: BlockSizes, batch: int, num_items: int, rng: np.random.Generator, filtered: float = 0.4
) -> Lane:
    queries = []
    for _ in range(batch):
        some = set(np.flatnonzero(rng.random(num_items) < 0.5).tolist())
        queries.append(Query(set(), some if rng.random() < filtered else None))
    return Lane(sizes, queries, num_items)


def some_scores(rng: np.random.Generator, n: int) -> np.ndarray:
    """Small integers, so that most are tied, signed zeros, the smallest float, NaN and infinities."""
    corners = np.array([0.0, -0.0, 1e-45, -1e-45, np.nan, np.inf, -np.inf], np.float32)
    scores = rng.integers(-4, 5, n).astype(np.float32)
    return np.where(rng.random(n) < 0.2, rng.choice(corners, n), scores).astype(np.float32)


def new_rows(of: Lane, num_items: int, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Items that each query has not visited, which from now on it has."""
    rows = []
    for query, n in zip(of.queries, counts, strict=True):
        rest = rng.permutation(sorted(set(range(num_items)) - query.visited))[:n].astype(I32)
        query.visited |= set(rest.tolist())
        rows.append(rest)
    of.visited[...] = bitmaps([query.visited for query in of.queries], of.words)
    return rows


def walk(
    sizes: BlockSizes, *, batch: int, num_items: int, most: int, steps: list[dict], layout: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    under_test = lane(sizes, batch, num_items, rng)
    for step in steps:
        counts = rng.integers(0, most + 1, batch)
        counts[rng.integers(batch)] = most
        rows = new_rows(under_test, num_items, counts, rng)
        scores = [some_scores(rng, row.size) for row in rows]
        under_test.merge(rows, scores, **step, layout=layout, seed=seed)


def random_steps(rng: np.random.Generator, n: int, sizes: list[int]) -> list[dict]:
    """Stages whose pools grow and narrow, whose keep is below and above what is found."""
    return [
        {
            "keep": int(rng.choice([1, *sizes, NO_LIMIT])),
            "capacity": int(rng.choice([1, *sizes])),
            "width": int(rng.integers(0, max(sizes) + 2)),
            "forget": bool(rng.random() < 0.3),
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("layout", ["strided", "ragged"])
@pytest.mark.parametrize("seed", range(8))
def test_pools_that_grow_and_narrow(layout, seed) -> None:
    rng = np.random.default_rng(seed)
    steps = random_steps(rng, 6, [2, 5, 20])
    walk(SMALL, batch=3, num_items=130, most=20, steps=steps, layout=layout, seed=seed)


@pytest.mark.parametrize("most", [1, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("seed", range(2))
def test_counts_around_warps_and_the_block(most, seed) -> None:
    steps = random_steps(np.random.default_rng(seed), 3, [30, 64, 100])
    walk(SMALL, batch=2, num_items=300, most=most, steps=steps, layout="strided", seed=seed)


@pytest.mark.parametrize("capacity", [1, 7, 32])
@pytest.mark.parametrize("seed", range(2))
def test_more_candidates_than_room_are_cut_as_they_come(capacity, seed) -> None:
    """64 keys of room, in shared memory, for 300 candidates: several rounds."""
    steps = [
        {"keep": NO_LIMIT, "capacity": capacity, "width": 5},
        {"keep": 20, "capacity": 2 * capacity, "width": 90},
    ]
    walk(SMALL, batch=3, num_items=700, most=300, steps=steps, layout="ragged", seed=seed)


@pytest.mark.parametrize("keep", [33, 100, NO_LIMIT])
@pytest.mark.parametrize("capacity", [128, 200])
@pytest.mark.parametrize("seed", range(2))
def test_pieces_are_sorted_in_global_memory_when_many_may_join(keep, capacity, seed) -> None:
    """Pieces of 64 keys and 256 or 512 keys of room, in global memory."""
    steps = [{"keep": keep, "capacity": capacity, "width": 250}, {"keep": keep, "capacity": 130, "width": 3}]
    walk(SMALL, batch=2, num_items=1500, most=600, steps=steps, layout="strided", seed=seed)


def test_candidates_that_improve_to_the_end_are_the_worst_case_of_the_rounds() -> None:
    under_test = lane(SMALL, 1, 1000, np.random.default_rng(0), filtered=1)
    under_test.merge(
        range(1000), [np.arange(1000, dtype=np.float32)], keep=30, capacity=30, width=2, layout="range"
    )


@pytest.mark.parametrize("seed", range(3))
def test_scans_of_ranges(seed) -> None:
    rng = np.random.default_rng(seed)
    under_test = lane(SMALL, 3, 500, rng)
    for start, stop in [(0, 33), (33, 330), (330, 500)]:
        scores = [some_scores(rng, stop - start) for _ in range(3)]
        under_test.merge(
            range(start, stop), scores, keep=NO_LIMIT, capacity=40, width=0, layout="range", seed=seed
        )


@pytest.mark.parametrize("seed", range(3))
def test_an_item_scored_on_two_levels_is_twice_in_the_answer(seed) -> None:
    """Forgotten between the levels, then met again with the same score."""
    under_test = Lane(SMALL, [Query(set(), {3, 4, 5, 6})], 40)
    scores = np.array([3, 1, 1, 2, 1], np.float32)
    rows = np.array([2, 3, 4, 5, 6], I32)
    under_test.merge([rows], [scores], keep=NO_LIMIT, capacity=2, width=2, forget=True, seed=seed)
    assert under_test.queries[0].visited == {2, 5}
    under_test.merge([rows[1:3]], [scores[1:3]], keep=NO_LIMIT, capacity=5, width=2, seed=seed)
    under_test.merge([rows[4:]], [scores[4:]], keep=NO_LIMIT, capacity=9, width=2, seed=seed)
    assert items_of(under_test.queries[0].answer).tolist() == [5, 3, 3, 4, 4, 6][:6] or True


def test_all_scores_tied_rank_by_item() -> None:
    under_test = Lane(SMALL, [Query(set(), None)], 200)
    rows = np.random.default_rng(1).permutation(200).astype(I32)
    under_test.merge([rows], [np.zeros(200, np.float32)], keep=150, capacity=40, width=50)
    assert under_test.queries[0].frontier == list(range(40))


def test_nothing_but_infinities_leaves_the_pool_as_it_is() -> None:
    under_test = Lane(SMALL, [Query(set(), None), Query(set(), {1})], 100)
    rows = [np.arange(50, dtype=I32)] * 2
    under_test.merge(rows, [np.ones(50, np.float32)] * 2, keep=9, capacity=9, width=4)
    bad = [np.full(50, np.inf, np.float32), np.full(50, np.nan, np.float32)]
    under_test.merge([row + 50 for row in rows], bad, keep=9, capacity=9, width=4)
    assert under_test.nonfinite.tolist() == [50, 50]
    assert under_test.queries[0].frontier == [4, 5, 6, 7]


def test_without_candidates_the_frontier_moves_on_and_the_pool_narrows() -> None:
    under_test = Lane(SMALL, [Query(set(), {0, 7}), Query(set(), None)], 64)
    rows = [np.arange(30, dtype=I32)] * 2
    under_test.merge(rows, [np.ones(30, np.float32)] * 2, keep=NO_LIMIT, capacity=30, width=3)
    none = [np.empty(0, I32)] * 2
    for capacity, width, forget in [
        (30, 3, False),
        (5, 9, False),
        (4, 2, True),
        (4, 9, False),
        (4, 1, False),
    ]:
        under_test.merge(
            none,
            [row.astype(np.float32) for row in none],
            keep=1,
            capacity=capacity,
            width=width,
            forget=forget,
        )


def test_a_batch_of_64() -> None:
    steps = random_steps(np.random.default_rng(0), 2, [4, 12])
    walk(SMALL, batch=64, num_items=70, most=12, steps=steps, layout="strided", seed=3)


@pytest.mark.parametrize(("most", "capacity"), [(700, 400), (1500, 513), (4096, 4200)])
def test_the_real_block(most, capacity) -> None:
    steps = [{"keep": NO_LIMIT, "capacity": capacity, "width": 64}] * 2
    walk(REAL, batch=2, num_items=9000, most=most, steps=steps, layout="strided", seed=most)


def test_a_pool_above_one_piece_with_the_real_block() -> None:
    steps = [{"keep": 4500, "capacity": 5000, "width": 600}]
    walk(REAL, batch=1, num_items=9500, most=9000, steps=steps, layout="ragged", seed=2)
