"""Recording a search's scoring calls, replaying them, making them at once: nothing lost, nothing added."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from engine_world import IntegerScorer, World, make_world

from nann.engine.artifacts import Artifact
from nann.engine.devices import cpu_lanes
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.machine import Machine
from nann.offline.benchmark.overhead import Saturation, measure_overhead
from nann.offline.benchmark.recording import RecordedSearch, RecordingScorer, ScoreCall
from nann.offline.benchmark.report import overhead_json, overhead_text

MAX_ROWS = 128


class Logging(IntegerScorer):
    """Keeps every (user, item vector) pair's score, row by row, padding included."""

    def __init__(self, world: World, max_batch: int) -> None:
        super().__init__(world.item_vectors, max_batch=max_batch, max_rows=MAX_ROWS)
        self.grid = BucketGrid(max_batch=max_batch, max_rows=MAX_ROWS)
        self.scores: list[np.ndarray] = []
        self.encoded: list[np.ndarray] = []

    def encode_history(self, history: np.ndarray) -> np.ndarray:
        self.encoded.append(history.copy())
        return np.asarray(super().encode_history(history))

    def score(self, users: np.ndarray, tiles: object) -> np.ndarray:
        scores = super().score(users, tiles)  # type: ignore[arg-type]
        self.scores.append(scores.copy())
        return scores


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "v", num_items=600, degree=8, seed=1)


def build(
    world: World, *, lanes: int = 1, max_batch: int = 4
) -> tuple[SearchEngine, RecordingScorer, Logging]:
    inner = Logging(world, max_batch)
    scorer = RecordingScorer(inner)
    artifact = Artifact.open(world.directory)
    engine = SearchEngine(
        artifact,
        cpu_lanes(artifact, [scorer] * lanes, max_batch=max_batch),
        max_batch=max_batch,
        max_k=1000,
    )
    engine.warm_up()
    return engine, scorer, inner


def prepared(engine: SearchEngine, world: World, n: int, seed: int = 0) -> list[PreparedQuery]:
    rng = np.random.default_rng(seed)
    params = SearchParams(ef=60, beam_width=8)
    return [
        engine.check(Query(k=20, params=params, history=rng.choice(world.item_ids, 5).tolist()))
        for _ in range(n)
    ]


def record(engine: SearchEngine, scorer: RecordingScorer, batch: list[PreparedQuery]) -> RecordedSearch:
    scorer.start()
    engine.search(batch, 0)
    return scorer.stop()


def real_scores(call: ScoreCall, scores: np.ndarray) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    flat = scores.reshape(-1)
    for segment in call.plan.segments:
        rows = flat[segment.row : segment.row + segment.stop - segment.start]
        found.setdefault(segment.query, []).extend(rows.tolist())
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_replay_makes_the_same_calls(world: World, batch_size: int) -> None:
    engine, scorer, inner = build(world)
    batch = prepared(engine, world, batch_size)
    inner.scores, inner.encoded = [], []
    recorded = record(engine, scorer, batch)
    searched, encoded = inner.scores, inner.encoded
    inner.scores, inner.encoded = [], []
    assert len(searched) > 2
    # The lane's buffers are used again by the next search: the recording must hold copies.
    engine.search(prepared(engine, world, batch_size, seed=9), 0)
    inner.scores, inner.encoded = [], []
    recorded.replay(scorer)
    assert len(inner.scores) == len(searched)
    for again, before in zip(inner.scores, searched, strict=True):
        np.testing.assert_array_equal(again, before)
    np.testing.assert_array_equal(inner.encoded, encoded)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_at_once_scores_the_same_pairs(world: World, batch_size: int) -> None:
    engine, scorer, inner = build(world)
    inner.scores = []
    recorded = record(engine, scorer, prepared(engine, world, batch_size))
    stepwise: dict[int, list[float]] = {}
    for call, scores in zip(recorded.calls, inner.scores, strict=True):
        for query, some in real_scores(call, scores).items():
            stepwise.setdefault(query, []).extend(some)
    inner.scores = []
    users = recorded.encode(scorer)
    at_once: dict[int, list[float]] = {}
    calls = recorded.in_one_call(scorer.grid)
    for call in calls:
        for query, some in real_scores(call, scorer.score(users, call.tiles)).items():
            at_once.setdefault(query, []).extend(some)
    assert at_once == stepwise
    assert len(calls) < len(recorded.calls)
    assert sum(call.real_pairs for call in calls) == recorded.real_pairs


def test_real_pairs_are_what_the_search_reports(world: World) -> None:
    engine, scorer, inner = build(world)
    batch = prepared(engine, world, 3)
    scorer.start()
    hits = engine.search(batch, 0)
    recorded = scorer.stop()
    assert recorded.real_pairs == sum(hit.n_scored for hit in hits)
    shapes = [tuple(map(int, call)) for call in inner.calls[-len(recorded.calls) :]]
    assert recorded.scored_rows == sum(tiles * rows for tiles, rows in shapes) > recorded.real_pairs


def test_inputs_are_aligned_so_that_no_copy_is_replayed(world: World) -> None:
    engine, scorer, _ = build(world)
    recorded = record(engine, scorer, prepared(engine, world, 2))
    for call in [*recorded.calls, *recorded.in_one_call(scorer.grid)]:
        for array in call.tiles.items.values():
            assert array.ctypes.data % 64 == 0
            assert array.shape[:2] == (call.plan.shape.tiles, call.plan.shape.rows)


def test_nothing_is_kept_outside_a_recording(world: World) -> None:
    engine, scorer, _ = build(world)
    recorded = record(engine, scorer, prepared(engine, world, 1))
    n_calls = len(recorded.calls)
    engine.search(prepared(engine, world, 1, seed=5), 0)
    assert len(recorded.calls) == n_calls
    scorer.start()
    with pytest.raises(RuntimeError, match="no search"):
        scorer.stop()


@pytest.mark.parametrize("saturation", [Saturation(1, 1), Saturation(2, 3)])
def test_overhead_of_a_small_world(world: World, saturation: Saturation) -> None:
    engine, scorer, _ = build(world, lanes=2)
    n = 4
    queries = prepared(engine, world, n * saturation.batch)
    batches = [queries[i::n] for i in range(n)]
    measured = measure_overhead(engine, scorer, batches, saturation, rounds=3)
    assert (measured.lanes, measured.batch, measured.searches) == (saturation.lanes, saturation.batch, n)
    assert 0 < measured.padding < 1
    assert measured.calls_per_search > measured.calls_at_once_per_search >= 1
    assert sum(measured.phases.values()) == pytest.approx(1)
    assert list(measured.phases) == ["encode", "expand", "gather", "score", "merge", "results"]
    assert len(measured.rounds) == 3
    assert measured.overhead == pytest.approx(measured.search_ms / measured.replay_ms)
    assert all(value > 0 for one in measured.rounds for value in one.values())
    hits = [hit for batch in batches for hit in engine.search(batch, 0)]
    assert measured.items_scored_per_query == pytest.approx(np.mean([hit.n_scored for hit in hits]))
    text = overhead_text([measured], Machine.here(), {"model": "world"})
    for words in (saturation.name, "search / replay", "target ≤ 1.25", "padding", "target ≤ 20 %", "merge"):
        assert words in text, words
    assert overhead_json([measured], Machine.here(), {})["overhead"] == [asdict(measured)]


def test_a_failing_search_is_raised_not_timed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, scorer, inner = build(world, lanes=2)
    batches = [[query] for query in prepared(engine, world, 2)]

    def fail(*_: object) -> np.ndarray:
        raise ZeroDivisionError

    calls = iter(range(1000))

    def fail_later(users: np.ndarray, tiles: object) -> np.ndarray:
        return fail() if next(calls) > 40 else Logging.score(inner, users, tiles)

    monkeypatch.setattr(inner, "score", fail_later)
    with pytest.raises(ZeroDivisionError):
        measure_overhead(engine, scorer, batches, Saturation(2, 1), rounds=50)


def test_wrong_batches_are_refused(world: World) -> None:
    engine, scorer, _ = build(world)
    queries = prepared(engine, world, 2)
    with pytest.raises(ValueError, match="batches of 2"):
        measure_overhead(engine, scorer, [queries[:1]], Saturation(1, 2), rounds=1)
    with pytest.raises(ValueError, match="at least one round"):
        measure_overhead(engine, scorer, [queries], Saturation(1, 2), rounds=0)
    with pytest.raises(ValueError, match="1 lanes"):
        measure_overhead(engine, scorer, [queries], Saturation(2, 2), rounds=1)


def test_users_of_an_artifact(world: World, tmp_path: Path) -> None:
    from nann.offline.benchmark.users import read_users, sample_users

    users = sample_users(world.directory, limit=5, seed=0)
    assert users == sample_users(world.directory, limit=5, seed=0)
    assert users != sample_users(world.directory, limit=5, seed=1)
    assert len({user.user_id for user in users}) == 5
    engine = world.engine()
    for user in users:
        assert user.user_id is not None
        assert tuple(user.history or ()) == engine.user_history(user.user_id)
    assert len(sample_users(world.directory, limit=None, seed=0)) == 20

    file = tmp_path / "users.jsonl"
    file.write_text('{"user_id": "a"}\n\n{"history": [1, 2]}\n')
    assert [(user.user_id, user.history) for user in read_users(file)] == [("a", None), (None, [1, 2])]
    for text, words in (('{"user": 1}', "line 1"), ("[1]", "line 1"), ("{", "line 1"), ("", "no user")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_users(file)
