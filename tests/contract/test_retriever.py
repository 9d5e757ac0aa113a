"""What every Retriever promises on every Backend, with an integer-valued scorer so that ties abound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from engine_world import DIM, HISTORY_LENGTH, IntegerScorer, World, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import BACKENDS, RETRIEVERS, AdaptedScorer

from nann.engine.artifacts import Artifact
from nann.engine.backend import Admission
from nann.engine.retrievers.retriever import PreparedQuery, Retriever, silent
from nann.engine.types import SearchParams

N, MAX_BATCH = 150, 6
EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
PHASES = {"encode", "expand", "scan", "gather", "score", "merge"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("retriever") / "1", num_items=N)


@pytest.fixture(scope="module")
def build(world) -> Callable[..., Retriever]:
    artifact = Artifact.open(world.directory)

    def make(retriever: str, backend: str, *, max_rows: int = 256, poison: bool = False) -> Retriever:
        scorer = IntegerScorer(world.item_vectors, max_batch=MAX_BATCH, max_rows=max_rows)
        if poison:
            score = scorer.score
            scorer.score = lambda users, tiles: np.where(
                (tiles.items["item_vector"] == world.item_vectors[7]).all(axis=-1),
                np.nan,
                score(users, tiles),
            )
        case = BACKENDS[backend]
        lane = case.make(
            num_items=N,
            neighbors=artifact.neighbors,
            item_state=artifact.item_state,
            max_batch=MAX_BATCH,
            max_pairs=max_rows,
            item_vectors=np.ones((N, 2), np.float32),
        )
        return RETRIEVERS[retriever](lane, AdaptedScorer(case, scorer), num_items=N)

    return make


@pytest.fixture(scope="module", params=[(r, b) for r in RETRIEVERS for b in BACKENDS], ids="-".join)
def pair(request) -> Iterator[tuple[str, str]]:
    with BACKENDS[request.param[1]].around():
        yield request.param


def prepared(history: np.ndarray, *, k: int, admission: Admission | None = None) -> PreparedQuery:
    """Parameters under which every retriever must find the exact answer."""
    padded = np.full(HISTORY_LENGTH, -1, np.int32)
    padded[: history.size] = history
    return PreparedQuery(
        k=k,
        params=SearchParams(ef=N, beam_width=16, max_steps=N),
        retriever="hnsw",
        history=padded,
        comm_seq=None,
        known_history=history.size,
        starts=history.astype(np.int32),
        admission=admission,
        gate=None,
        cost=N,
        notes=(),
        with_attributes=False,
    )


def random_query(rng: np.random.Generator) -> PreparedQuery:
    history = rng.integers(0, N, int(rng.integers(1, HISTORY_LENGTH + 1))).astype(np.int32)
    admission = None
    if rng.random() < 0.6:
        mask = rng.random(N) < rng.random() if rng.random() < 0.7 else None
        excluded = np.unique(rng.integers(0, N, int(rng.integers(0, 30)))).astype(np.int32)
        admission = Admission(mask, excluded, int(admissible(mask, excluded).sum()))
    return prepared(history, k=int(rng.integers(1, N + 1)), admission=admission)


def admissible(mask: np.ndarray | None, excluded: np.ndarray) -> np.ndarray:
    allowed = np.ones(N, bool) if mask is None else mask.copy()
    allowed[excluded] = False
    return allowed


def truth(world: World, query: PreparedQuery) -> tuple[list[int], list[float]]:
    scores = world.scores(query.history)
    order = np.lexsort((np.arange(N), -scores))
    if query.admission is not None:
        order = order[admissible(query.admission.mask, query.admission.excluded)[order]]
    order = order[: query.k]
    return order.tolist(), scores[order].tolist()


@EXAMPLES
@given(seed=st.integers(0, 10**6), size=st.integers(1, MAX_BATCH), max_rows=st.sampled_from([64, 256]))
def test_an_unhurried_search_is_exact_for_every_query_of_a_batch(
    world, build, pair, seed, size, max_rows
) -> None:
    rng = np.random.default_rng(seed)
    batch = [random_query(rng) for _ in range(size)]
    answers = build(*pair, max_rows=max_rows).search(batch, silent)
    assert len(answers) == size
    for query, answer in zip(batch, answers, strict=True):
        assert (answer.item_index.tolist(), answer.score.tolist()) == truth(world, query)
        assert answer.item_index.dtype == np.int32 and answer.score.dtype == np.float32
        assert sum(answer.scored_per_step) + answer.remainder_scored <= N
        assert answer.nonfinite == 0


@EXAMPLES
@given(seed=st.integers(0, 10**6))
def test_a_query_is_answered_alike_alone_and_in_any_company(build, pair, seed) -> None:
    rng = np.random.default_rng(seed)
    batch = [random_query(rng) for _ in range(MAX_BATCH)]
    retriever = build(*pair)
    for query, answer in zip(batch, retriever.search(batch, silent), strict=True):
        (alone,) = retriever.search([query], silent)
        np.testing.assert_array_equal(alone.item_index, answer.item_index)
        np.testing.assert_array_equal(alone.score, answer.score)
        assert alone.scored_per_step == answer.scored_per_step
        assert alone.remainder_scored == answer.remainder_scored


def test_the_truth_is_not_trivial(world) -> None:
    """Ties and different users, or the tests above could not tell a wrong order."""
    scores = world.scores(np.array([1, 2, 3]))
    assert len(np.unique(scores)) < N / 2
    assert (scores != world.scores(np.array([4, 5]))).any()


def test_an_embedded_history_is_searched_too(world, build, pair) -> None:
    if pair[0] == "inner_product":
        pytest.skip("needs a history; the engine's check refuses others")
    history = np.array([3, 9], np.int32)
    query = prepared(history, k=20)
    vector = np.zeros(HISTORY_LENGTH * 2, np.float32)
    vector[:DIM] = world.item_vectors[[3, 9]].astype(np.int64).sum(axis=0) % 7 - 3
    embedded = replace(query, history=None, comm_seq=vector, known_history=None)
    (answer,) = build(*pair).search([embedded], silent)
    assert (answer.item_index.tolist(), answer.score.tolist()) == truth(world, query)


def test_non_finite_scores_are_counted_and_never_rank(world, build, pair) -> None:
    assert (world.item_vectors == world.item_vectors[7]).all(axis=1).sum() == 1
    query = prepared(np.array([3, 9], np.int32), k=N)
    (answer,) = build(*pair, poison=True).search([query], silent)
    wanted = [item for item in truth(world, query)[0] if item != 7]
    assert answer.item_index.tolist() == wanted
    assert answer.nonfinite == 1


def test_nothing_admissible_is_an_empty_answer(build, pair) -> None:
    none = Admission(np.zeros(N, bool), np.empty(0, np.int32), 0)
    (answer,) = build(*pair).search([prepared(np.array([1]), k=5, admission=none)], silent)
    assert answer.item_index.size == answer.score.size == 0


def test_only_the_known_phases_are_reported(build, pair) -> None:
    heard: list[str] = []
    build(*pair).search([prepared(np.array([1, 2]), k=5)], heard.append)
    assert set(heard) <= PHASES
    assert {"encode", "gather", "score", "merge"} <= set(heard)
