"""The CPU kernels against plain Python on small random inputs with many ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_kernels import ReferencePool, bitmap_of, first_sights, ranked_pairs, set_of

from nann.engine.cpu import kernels

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
NUM_ITEMS = 150
MAX32 = np.finfo(np.float32).max
TINY32 = float(np.finfo(np.float32).smallest_subnormal)
NORMAL32 = float(np.finfo(np.float32).tiny)
CORNERS = [0.0, -0.0, TINY32, -TINY32, NORMAL32, -NORMAL32, 1.0, -1.0, MAX32, -MAX32, 1.0000001, 0.99999994]

finite = st.one_of(st.sampled_from(CORNERS), st.floats(width=32, allow_nan=False, allow_infinity=False))
any_score = st.one_of(finite, st.integers(-3, 3).map(float), st.sampled_from([np.nan, np.inf, -np.inf]))
item = st.integers(0, NUM_ITEMS - 1)


def f32(values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def i32(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def splits_of(rows) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)]).astype(np.int32)


# -- pack, unpack -----------------------------------------------------------------------------------


@EXAMPLES
@given(st.lists(st.tuples(finite, st.integers(0, 2**31 - 1)), min_size=1, max_size=60))
def test_ascending_keys_are_the_total_order(pairs) -> None:
    scores, items = f32([s for s, _ in pairs]), i32([i for _, i in pairs])
    keys = kernels.pack(scores, items)
    by_key = [(float(scores[j]), int(items[j])) for j in np.argsort(keys, kind="stable")]
    assert by_key == ranked_pairs(zip(scores.tolist(), items.tolist(), strict=True))


@EXAMPLES
@given(st.lists(st.tuples(finite, st.integers(0, 2**31 - 1)), max_size=60))
def test_unpack_inverts_pack_bit_for_bit(pairs) -> None:
    scores, items = f32([s for s, _ in pairs]), i32([i for _, i in pairs])
    found_items, found_scores = kernels.unpack(kernels.pack(scores, items))
    assert found_items.dtype == np.int32 and found_scores.dtype == np.float32
    np.testing.assert_array_equal(found_items, items)
    positive_zero = np.where(scores == 0, np.float32(0), scores)
    np.testing.assert_array_equal(found_scores.view(np.uint32), positive_zero.view(np.uint32))


def test_signed_zeros_share_a_key_and_neighbouring_floats_do_not() -> None:
    zeros = kernels.pack(f32([0.0, -0.0]), i32([7, 7]))
    assert zeros[0] == zeros[1]
    ladder = f32(sorted({float(np.float32(c)) for c in CORNERS}, reverse=True))
    keys = kernels.pack(ladder, np.zeros(ladder.size, np.int32))
    assert (keys[1:] > keys[:-1]).all()


def test_the_last_item_index_of_a_better_score_ranks_before_the_first_of_a_worse_one() -> None:
    keys = kernels.pack(f32([1.0, np.nextafter(np.float32(1), np.float32(0))]), i32([2**31 - 1, 0]))
    assert keys[0] < keys[1]


# -- seed, expand -----------------------------------------------------------------------------------


@EXAMPLES
@given(
    rows=st.lists(st.lists(st.integers(-1, NUM_ITEMS - 1), max_size=12), min_size=1, max_size=4),
    before=st.sets(item, max_size=40),
)
def test_seed_keeps_the_first_sight_of_each(rows, before) -> None:
    visited = np.stack([bitmap_of(before, NUM_ITEMS)] * len(rows))
    flat, splits = i32([i for row in rows for i in row]), splits_of(rows)
    out, out_splits = np.full(flat.size, -9, np.int32), np.empty_like(splits)
    kernels.seed(visited, flat, splits, out, out_splits)
    assert out_splits[0] == 0
    for b, row in enumerate(rows):
        seen = set(before)
        wanted = first_sights((i for i in row if i >= 0), seen)
        assert out[out_splits[b] : out_splits[b + 1]].tolist() == wanted
        assert set_of(visited[b]) == seen


@settings(EXAMPLES, max_examples=40)
@given(
    table=st.builds(
        lambda seed, degree: np.sort(
            np.random.default_rng(seed).integers(-1, NUM_ITEMS, (NUM_ITEMS, degree)), axis=1
        )[:, ::-1].astype(np.int32, order="C"),
        st.integers(0, 999),
        st.integers(1, 6),
    ),
    frontier=st.lists(st.lists(item, max_size=5), min_size=1, max_size=4),
    before=st.sets(item, max_size=90),
)
def test_expand_lists_unvisited_neighbours_in_order(table, frontier, before) -> None:
    batch, width = len(frontier), 5
    nodes = np.full((batch, width), NUM_ITEMS - 1, np.int32)  # entries past `count` must not be read
    count = i32([len(row) for row in frontier])
    for b, row in enumerate(frontier):
        nodes[b, : len(row)] = row
    visited = np.stack([bitmap_of(before, NUM_ITEMS)] * batch)
    out = np.empty(int(count.sum()) * table.shape[1], np.int32)
    out_splits = np.empty(batch + 1, np.int32)
    kernels.expand(visited, table, nodes, count, out, out_splits)
    for b, row in enumerate(frontier):
        seen = set(before)
        neighbours = (int(i) for node in row for i in table[node] if i >= 0)
        wanted = first_sights(neighbours, seen)
        assert out[out_splits[b] : out_splits[b + 1]].tolist() == wanted
        assert set_of(visited[b]) == seen


@pytest.mark.parametrize("index", [0, 1, 63, 64, 65, 127, 128, NUM_ITEMS - 1])
def test_every_bit_of_the_bitmap_stands_for_its_own_item(index) -> None:
    visited = np.zeros((1, 3), np.uint64)
    out, splits = np.empty(1, np.int32), np.empty(2, np.int32)
    kernels.seed(visited, i32([index]), i32([0, 1]), out, splits)
    assert set_of(visited[0]) == {index}


# -- merge, select, forget --------------------------------------------------------------------------


@EXAMPLES
@given(data=st.data(), batch=st.integers(1, 3), filtered=st.booleans())
def test_a_sequence_of_merges_and_selections_equals_the_reference(data, batch, filtered) -> None:
    """Random rounds over one pool, so that capacity, ties and expanded flags meet."""
    allocated = 12
    keys = np.empty((batch, allocated), np.uint64)
    expanded = np.full((batch, allocated), 99, np.uint8)
    size, nonfinite = np.zeros(batch, np.int32), np.zeros(batch, np.int64)
    pools = [ReferencePool() for _ in range(batch)]
    unused = [data.draw(st.permutations(range(NUM_ITEMS))) for _ in range(batch)]
    for _ in range(data.draw(st.integers(1, 5))):
        counts = [data.draw(st.integers(0, 10)) for _ in range(batch)]
        items = [[unused[b].pop() for _ in range(counts[b])] for b in range(batch)]
        flat, splits = i32([i for row in items for i in row]), splits_of(items)
        scores = f32(data.draw(st.lists(any_score, min_size=flat.size, max_size=flat.size)))
        allowed = np.array(
            data.draw(st.lists(st.booleans(), min_size=flat.size, max_size=flat.size)) if filtered else [],
            dtype=np.bool_,
        )
        keep, capacity = data.draw(st.sampled_from([1, 3, 2**31 - 1])), data.draw(st.integers(1, allocated))
        kernels.merge(
            keys, expanded, size, flat, splits, scores, allowed, keep, capacity, nonfinite,
            np.empty(flat.size, np.uint64), np.empty(allocated, np.uint64), np.empty(allocated, np.uint8),
        )  # fmt: skip
        width = data.draw(st.integers(0, 4))
        frontier, count = np.empty((batch, width), np.int32), np.empty(batch, np.int32)
        kernels.select(keys, expanded, size, width, frontier, np.empty(frontier.shape, np.float32), count)
        for b, pool in enumerate(pools):
            part = slice(splits[b], splits[b + 1])
            mask = allowed[part].tolist() if filtered and flat.size else None
            pool.merge(items[b], scores[part].tolist(), keep=keep, capacity=capacity, allowed=mask)
            chosen = pool.select(width)
            found_items, found_scores = kernels.unpack(keys[b, : size[b]])
            assert list(zip(found_scores.tolist(), found_items.tolist(), strict=True)) == pool.ranked
            assert frontier[b, : count[b]].tolist() == chosen
            assert {i for i, e in zip(found_items.tolist(), expanded[b], strict=False) if e} == pool.expanded
            assert nonfinite[b] == pool.nonfinite


def test_merge_ranks_ties_by_item_index_whichever_came_first() -> None:
    keys, expanded = np.empty((1, 4), np.uint64), np.zeros((1, 4), np.uint8)
    size, nonfinite = np.zeros(1, np.int32), np.zeros(1, np.int64)
    for items in ([9, 4], [7, 1]):
        kernels.merge(
            keys, expanded, size, i32(items), i32([0, 2]), f32([0.0, -0.0]), np.empty(0, np.bool_), 9, 3,
            nonfinite, np.empty(2, np.uint64), np.empty(4, np.uint64), np.empty(4, np.uint8),
        )  # fmt: skip
    assert kernels.unpack(keys[0, : size[0]])[0].tolist() == [1, 4, 7]


@EXAMPLES
@given(pools=st.lists(st.lists(item, unique=True, max_size=10), min_size=1, max_size=4), before=st.sets(item))
def test_forget_leaves_only_the_pool_visited_and_none_expanded(pools, before) -> None:
    batch, allocated = len(pools), 10
    keys = np.zeros((batch, allocated), np.uint64)
    for b, row in enumerate(pools):
        keys[b, : len(row)] = kernels.pack(np.zeros(len(row), np.float32), i32(row))
    visited = np.stack([bitmap_of(before, NUM_ITEMS)] * batch)
    expanded = np.ones((batch, allocated), np.uint8)
    kernels.forget(visited, keys, expanded, i32([len(row) for row in pools]))
    for b, row in enumerate(pools):
        assert set_of(visited[b]) == set(row)
        assert not expanded[b, : len(row)].any()


# -- admit, gather ----------------------------------------------------------------------------------


@EXAMPLES
@given(
    rows=st.lists(st.tuples(st.lists(item, max_size=30), st.sets(item, max_size=30)), min_size=1, max_size=4)
)
def test_admit_bars_what_each_query_excludes(rows) -> None:
    items = [i for row, _ in rows for i in row]
    excluded = [i for _, barred in rows for i in sorted(barred)]
    splits = i32(np.cumsum([0, *(len(row) for row, _ in rows)]))
    excluded_splits = i32(np.cumsum([0, *(len(barred) for _, barred in rows)]))
    out = np.empty(len(items), np.bool_)
    kernels.admit(i32(items), splits, i32(excluded), excluded_splits, out)
    assert out.tolist() == [i not in barred for row, barred in rows for i in row]


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32, np.uint16, np.uint8])
def test_gather_rows_lays_segments_out_as_tiles(dtype) -> None:
    rng = np.random.default_rng(5)
    tables = tuple(rng.integers(0, np.iinfo(dtype).max, (40, words), dtype=dtype) for words in (3, 9))
    wanted = i32(rng.integers(0, 40, 17))
    # Query 2 fills rows 0..9 of two tiles of 8, query 5 rows 16..22; the third tile's last row is padding.
    segments = i32([(2, 0, 10, 0), (5, 10, 17, 16)])
    outs = tuple(np.full((32, words), 7, dtype) for words in (3, 9))
    tile_query = np.full(3, 9, np.int32)
    kernels.gather_rows(tables, wanted, segments, 8, 24, outs, tile_query)
    for table, out in zip(tables, outs, strict=True):
        np.testing.assert_array_equal(out[:10], table[wanted[:10]])
        np.testing.assert_array_equal(out[16:23], table[wanted[10:]])
        assert not out[10:16].any() and not out[23:24].any()
        assert (out[24:] == 7).all()
    assert tile_query.tolist() == [2, 2, 5]
