"""What every Scorer promises; sameness rule (b) of the design above all: a pair's score is bit-equal
whatever shape, batch-mates, position or thread it was computed in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from registry import BACKENDS, MAX_BATCH, SCORERS, AdaptedScorer, BackendCase, ScorerCase

from nann.engine.backend import Tiles
from nann.engine.retrievers.retriever import silent
from nann.engine.scoring.buckets import Shape
from nann.engine.scoring.scorer import score_candidates


@dataclass(frozen=True)
class Warm:
    """A warmed-up scorer, its users, and the scores of all pairs as one shape gives them: [users, N]."""

    case: ScorerCase
    n_programs: int
    histories: np.ndarray
    scores: np.ndarray

    @property
    def scorer(self):
        return self.case.scorer


def random_histories(rng: np.random.Generator, case: ScorerCase, n: int) -> np.ndarray:
    """Of every length from none to full, -1 padded at the end."""
    histories = np.full((n, case.history_length), -1, np.int32)
    for b in range(n):
        length = (case.history_length * b) // max(n - 1, 1)
        histories[b, :length] = rng.integers(0, case.num_items, length)
    return histories


def tiles_of(case: ScorerCase, shape: Shape, items: np.ndarray, tile_query: np.ndarray) -> Tiles:
    """The item tensors of `items` [pairs] laid out in `shape`."""
    tensors = {
        name: table[items].reshape(shape.tiles, shape.rows, *table.shape[1:])
        for name, table in case.item_state.items()
    }
    return Tiles(shape, tile_query.astype(np.int32), tensors)


def same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
    return np.array_equal(
        np.ascontiguousarray(found).view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32)
    )


@pytest.fixture(scope="session", params=SCORERS)
def warm(request, tmp_path_factory) -> Warm:
    case = SCORERS[request.param](tmp_path_factory.mktemp(request.param) / "1")
    case.scorer.warm_up()
    n_programs = case.scorer.n_compilations
    histories = random_histories(np.random.default_rng(1), case, MAX_BATCH)
    users = case.scorer.encode_history(histories)
    smallest = next(iter(case.scorer.grid.shapes()))
    scores = np.empty((MAX_BATCH, case.num_items), np.float32)
    for b in range(MAX_BATCH):
        for start in range(0, case.num_items, smallest.rows):
            items = np.resize(np.arange(start, min(start + smallest.rows, case.num_items)), smallest.rows)
            found = case.scorer.score(users, tiles_of(case, smallest, items, np.array([b])))
            scores[b, items] = found[0]
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 10
    return Warm(case, n_programs, histories, scores)


def shapes_of(warm: Warm) -> Iterator[Shape]:
    return warm.scorer.grid.shapes()


def test_a_pair_scores_the_same_bits_in_every_shape_and_position(warm) -> None:
    rng = np.random.default_rng(2)
    users = warm.scorer.encode_history(warm.histories)
    for shape in shapes_of(warm):
        for _ in range(2):
            items = rng.integers(0, warm.case.num_items, shape.pairs)
            tile_query = rng.integers(0, MAX_BATCH, shape.tiles)
            found = warm.scorer.score(users, tiles_of(warm.case, shape, items, tile_query))
            assert found.shape == (shape.tiles, shape.rows)
            assert found.dtype == np.float32
            wanted = warm.scores[np.repeat(tile_query, shape.rows), items]
            assert same_bits(found.reshape(-1), wanted), shape


def test_a_user_scores_the_same_bits_whoever_is_encoded_beside_them(warm) -> None:
    rng = np.random.default_rng(3)
    (wide, *_) = shapes_of(warm)
    items = rng.integers(0, warm.case.num_items, wide.rows)
    for size in range(1, MAX_BATCH + 1):
        chosen = rng.permutation(MAX_BATCH)[:size]
        users = warm.scorer.encode_history(warm.histories[chosen])
        for row, b in enumerate(chosen):
            found = warm.scorer.score(users, tiles_of(warm.case, wide, items, np.array([row])))
            assert same_bits(found[0], warm.scores[b, items]), (size, row)


def test_rows_of_padding_do_not_touch_their_neighbours(warm) -> None:
    users = warm.scorer.encode_history(warm.histories)
    for shape in list(shapes_of(warm))[::5]:
        items = np.zeros(shape.pairs, np.int64)
        tiles = tiles_of(warm.case, shape, items, np.zeros(shape.tiles))
        for table in tiles.items.values():
            table[:, 1:] = 0
        found = warm.scorer.score(users, tiles)
        assert same_bits(found[:, 0], np.full(shape.tiles, warm.scores[0, 0]))


@pytest.fixture(params=BACKENDS)
def backend_case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    case = BACKENDS[request.param]
    with case.around():
        yield case


def test_candidates_of_any_number_are_scored_in_their_order(warm, backend_case) -> None:
    rng = np.random.default_rng(4)
    case = backend_case
    scorer = AdaptedScorer(case, warm.scorer)
    backend = case.make(
        num_items=warm.case.num_items,
        neighbors=[],
        item_state=warm.case.item_state,
        max_batch=MAX_BATCH,
        max_pairs=scorer.grid.max_rows,
    )
    users = warm.scorer.encode_history(warm.histories)
    for counts in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 700, 0], [1, 33, 64, 5], [300, 0, 1, 900], [64] * 4):
        items = [rng.integers(0, warm.case.num_items, count).astype(np.int32) for count in counts]
        beam = backend.begin(MAX_BATCH, with_answer=[None] * MAX_BATCH)
        candidates = backend.listed(beam, items)
        score_candidates(backend, scorer, users, candidates, silent)
        backend.merge_beam(beam, candidates, keep=2**31 - 1, capacity=1000, width=0, forget=False)
        for b, (found, scores) in enumerate(backend.to_host(beam, [1000] * MAX_BATCH)):
            assert len(found) == counts[b]
            assert same_bits(scores, warm.scores[b, found]), counts
            ranked = sorted(items[b].tolist(), key=lambda i: (-warm.scores[b, i], i))
            assert found.tolist() == ranked


def test_two_threads_get_the_bits_that_one_gets(warm) -> None:
    shapes = list(shapes_of(warm))
    wrong: list[tuple[Shape, int]] = []
    barrier = threading.Barrier(2)

    def lane(seed: int) -> None:
        rng = np.random.default_rng(seed)
        barrier.wait()
        for round_ in range(30):
            order = rng.permutation(MAX_BATCH)
            users = warm.scorer.encode_history(warm.histories[order])
            shape = shapes[int(rng.integers(len(shapes)))]
            items = rng.integers(0, warm.case.num_items, shape.pairs)
            tile_query = rng.integers(0, MAX_BATCH, shape.tiles)
            found = warm.scorer.score(users, tiles_of(warm.case, shape, items, tile_query))
            wanted = warm.scores[np.repeat(order[tile_query], shape.rows), items]
            if not same_bits(found.reshape(-1), wanted):
                wrong.append((shape, round_))

    threads = [threading.Thread(target=lane, args=(seed,)) for seed in (10, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_answer_is_not_overwritten_by_the_next_call(warm) -> None:
    (shape, *_) = shapes_of(warm)
    users = warm.scorer.encode_history(warm.histories)
    items = np.arange(shape.rows) % warm.case.num_items
    first = warm.scorer.score(users, tiles_of(warm.case, shape, items, np.array([0])))
    kept = first.copy()
    warm.scorer.score(users, tiles_of(warm.case, shape, items[::-1], np.array([1])))
    assert same_bits(first, kept)


def test_an_embedded_history_is_the_history_it_embeds(warm) -> None:
    if warm.case.comm_seq is None:
        pytest.skip("the scorer's comm_seq is no embedding of a history")
    (shape, *_) = shapes_of(warm)
    embedded = np.stack([warm.case.comm_seq(history) for history in warm.histories])
    for size in range(1, MAX_BATCH + 1):
        users = warm.scorer.encode_comm_seq(embedded[:size])
        for b in range(size):
            items = np.arange(shape.rows) % warm.case.num_items
            found = warm.scorer.score(users, tiles_of(warm.case, shape, items, np.array([b])))
            np.testing.assert_allclose(found[0], warm.scores[b, items], rtol=1e-5, atol=1e-6)


def test_users_differ(warm) -> None:
    """Or none of the tests above could fail on a mixed-up user."""
    for b in range(1, MAX_BATCH):
        assert (warm.scores[b] != warm.scores[b - 1]).mean() > 0.5


def test_warming_up_compiles_everything(warm) -> None:
    """Runs after the work of the tests above, on the same scorer."""
    n_shapes = len(list(shapes_of(warm)))
    assert warm.n_programs >= n_shapes
    for batch in range(1, MAX_BATCH + 1):
        users = warm.scorer.encode_history(warm.histories[:batch])
    for shape in shapes_of(warm):
        warm.scorer.score(
            users, tiles_of(warm.case, shape, np.zeros(shape.pairs, np.int64), np.zeros(shape.tiles))
        )
    assert warm.scorer.n_compilations == warm.n_programs
    warm.scorer.warm_up()
    assert warm.scorer.n_compilations == warm.n_programs
