"""Whole searches by the CUDA backend over a fake XLA in many schedules: the answers are those of the CPU, and
are so no more once any one of the waits between lane, XLA and host is taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_kernels import SMALL
from engine_world import DIM, IntegerScorer, World, make_world
from fake_xla import FakeXla, fake_gpu, score_by_rows, score_crossed

from nann.engine.artifacts import Artifact
from nann.engine.backend import Tiles
from nann.engine.devices import cpu_lanes
from nann.engine.errors import BackendError
from nann.engine.retrievers.exhaustive import ExhaustiveRetriever
from nann.engine.retrievers.hnsw import HnswRetriever
from nann.engine.retrievers.retriever import PreparedQuery, silent
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.types import Query, SearchParams

N, MAX_BATCH = 120, 3
# The largest shape holds two tiles, so that most steps need several calls of the model.
GRID = BucketGrid(max_batch=MAX_BATCH, max_rows=64, tile_rows=32, wide=False, crossed_rows=32)
PARAMS = SearchParams(policy="best_first", ef=12, beam_width=4, max_steps=6)
SEEDS = range(12)
MANY_SEEDS = range(100)  # of which the rarest edge shows in one of five
_MOST_CALLS = 500  # of the model in one search, or the host read a count that was never written

Answers = list[tuple[list[int], list[float]]]


class XlaScorer:
    """user · item, as `PjrtScorer` would have XLA compute it."""

    grid = GRID

    def __init__(self, xla: FakeXla, handover: Any, model: IntegerScorer) -> None:
        self._xla, self._handover, self._model = xla, handover, model
        self._calls = 0
        self.broken = False

    def encode_history(self, history: np.ndarray) -> Any:
        self._calls = 0
        users = np.zeros((MAX_BATCH, self._model.item_vectors.shape[1]), np.float32)
        users[: len(history)] = self._model.encode_history(history)
        return self._xla.put(users)

    def score(self, users: Any, tiles: Tiles) -> Any:
        self._calls += 1
        assert self._calls < _MOST_CALLS
        if self.broken:
            raise BackendError("broken off")
        shape = (tiles.shape.tiles, tiles.shape.rows)
        items = tiles.items["item_vector"]
        if tiles.tile_query is None:
            (lent,) = self._handover.lend(items)
            output = self._xla.run(score_crossed, shape, lent, users)
        else:
            tile_query, lent = self._handover.lend(tiles.tile_query, items)
            output = self._xla.run(score_by_rows, shape, tile_query, lent, users)
        return self._handover.take(output)


@dataclass(frozen=True)
class Setting:
    """A corpus, batches of three kinds, and what the CPU answers."""

    world: World
    artifact: Artifact
    batches: dict[str, Sequence[PreparedQuery]]
    wanted: dict[str, Answers]


# A scan that lends the tables themselves; one whose items are written to the device; and a walk with
# filters, whose steps need several calls.
KINDS: dict[str, tuple[type[Any], SearchParams, int]] = {
    "scan": (ExhaustiveRetriever, SearchParams(policy="exhaustive"), 0),
    "filtered scan": (ExhaustiveRetriever, SearchParams(policy="exhaustive"), 2),
    "walk": (HnswRetriever, PARAMS, 2),
}


def answers(retriever: Any, batch: Sequence[PreparedQuery]) -> Answers:
    found = retriever.search(batch, silent)
    return [(answer.item_index.tolist(), answer.score.tolist()) for answer in found]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    directory: Path = tmp_path_factory.mktemp("handover") / "1"
    world = make_world(directory, num_items=N, degree=4)
    artifact = Artifact.open(directory)
    engine, item_ids = world.engine(), world.item_ids.tolist()
    scorer = IntegerScorer(world.item_vectors, max_batch=MAX_BATCH)
    ((backend, _),) = cpu_lanes(artifact, [scorer], max_batch=MAX_BATCH)
    batches, wanted = {}, {}
    for kind, (retriever, params, n_excluded) in KINDS.items():
        batches[kind] = [
            engine.check(
                Query(
                    history=[item_ids[i] for i in history],
                    k=10,
                    params=params,
                    exclude=item_ids[b : b + n_excluded],
                )
            )
            for b, history in enumerate([[3, 1, 4], [15, 9, 2, 6], [5]])
        ]
        assert len({query.compat for query in batches[kind]}) == 1
        assert (batches[kind][0].retriever == "hnsw") == (retriever is HnswRetriever)
        wanted[kind] = answers(retriever(backend, scorer, num_items=N), batches[kind])
    return Setting(world, artifact, batches, wanted)


class CudaLanes:
    """Lanes over tables of their own, on the fake GPU that is there."""

    def __init__(self, setting: Setting, xla: FakeXla, n: int) -> None:
        from nann.engine.cuda.backend import CudaBackend
        from nann.engine.cuda.handover import JaxHandover
        from nann.engine.cuda.tables import DeviceTables

        self._setting = setting
        tables = DeviceTables.load(
            neighbors=setting.artifact.neighbors,
            item_state=setting.artifact.item_state,
            item_vectors=setting.world.item_vectors,
            padding_rows=GRID.crossed_rows or 0,
            sizes=SMALL,
        )
        model = IntegerScorer(setting.world.item_vectors, max_batch=MAX_BATCH)
        self.backends = [CudaBackend(tables, grid=GRID) for _ in range(n)]
        self.scorers = [XlaScorer(xla, JaxHandover(backend.stream), model) for backend in self.backends]

    def search(self, lane: int, kind: str) -> Answers:
        retriever = KINDS[kind][0](self.backends[lane], self.scorers[lane], num_items=N)
        return answers(retriever, self._setting.batches[kind])


def search(setting: Setting, seed: int, change: Callable[[Any], None] = lambda patch: None) -> Any:
    """Two searches of each kind on one lane: the answers, or what went wrong. ``change`` breaks something."""
    try:
        with fake_gpu(seed) as (_, _, xla), pytest.MonkeyPatch.context() as patch:
            change(patch)
            lanes = CudaLanes(setting, xla, 1)
            first = {kind: lanes.search(0, kind) for kind in KINDS}
            return first, {kind: lanes.search(0, kind) for kind in reversed(KINDS)}
    except (AssertionError, BackendError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answers_are_those_of_the_cpu_in_every_schedule(setting, seed) -> None:
    assert search(setting, seed) == (setting.wanted, setting.wanted)


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_two_lanes_share_xla_and_the_tables(setting, seed) -> None:
    with fake_gpu(seed) as (_, _, xla), ThreadPoolExecutor(2) as threads:
        lanes = CudaLanes(setting, xla, 2)
        kinds = list(KINDS) * 2
        searches = [
            threads.submit(lambda lane=lane: [lanes.search(lane, kind) for kind in kinds]) for lane in (0, 1)
        ]
        for done in searches:
            assert done.result() == [setting.wanted[kind] for kind in kinds]


class Unordered:
    """An array that hands itself over without making anyone wait."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__(stream=-1)


def nothing_before_the_program(patch: Any) -> None:
    from nann.engine.cuda.handover import JaxHandover

    lend = JaxHandover._view
    patch.setattr(JaxHandover, "_view", lambda self, array: lend(self, _Disguised(array)))


class _Disguised(Unordered):
    """... and looks like the array otherwise."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


def no_array_is_lent_anew(patch: Any) -> None:
    from nann.engine.cuda.handover import JaxHandover

    def lend(self: Any, *arrays: Any) -> tuple[Any, ...]:
        with self._lane("lending"):
            return tuple(self._cached_view(array) for array in arrays)

    patch.setattr(JaxHandover, "lend", lend)


def scores_are_read_at_once(patch: Any) -> None:
    from nann.engine.cuda.handover import JaxHandover

    take = JaxHandover.take
    patch.setattr(JaxHandover, "take", lambda self, scores: take(self, Unordered(scores)))


def scores_are_not_held(patch: Any) -> None:
    from nann.engine.cuda.handover import JaxHandover

    take = JaxHandover.take

    def taken(self: Any, scores: Any) -> Any:
        array = take(self, scores)
        self._taken = []
        return array

    patch.setattr(JaxHandover, "take", taken)


def gathering_beside(*, edge: bool) -> Callable[[Any], None]:
    """A later call of a step gathers on another stream: after all it needs, and after the program of the
    call before, which reads the same tiles, only with the ``edge``."""

    def change(patch: Any) -> None:
        import cupy

        from nann.engine.cuda.launches import Launches

        gather = Launches.gather
        planned: dict[Any, Any] = {}

        def beside(self: Any, *, first_tile: int, **arguments: Any) -> None:
            lane = self._stream
            if first_tile == 0:
                planned[lane] = lane.record()
                gather(self, first_tile=first_tile, **arguments)
                return
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._stream.wait_event(lane.record() if edge else planned[lane])
            gather(self, first_tile=first_tile, **arguments)
            gathered = self._stream.record()
            self._stream = lane
            lane.wait_event(gathered)

        patch.setattr(Launches, "gather", beside)

    return change


def the_host_does_not_wait(operation: str) -> Callable[[Any], None]:
    def change(patch: Any) -> None:
        from nann.engine.cuda.lane_state import LaneState

        wait = LaneState._wait
        patch.setattr(LaneState, "_wait", lambda self, what: None if what == operation else wait(self, what))

    return change


def staged_inputs_are_overwritten_at_once(patch: Any) -> None:
    from nann.engine.cuda.lane_memory import LaneMemory

    stage = LaneMemory._stage

    def from_the_start(self: Any, n_bytes: int) -> int:
        self.staged_may_be_reused()
        return stage(self, n_bytes)

    patch.setattr(LaneMemory, "_stage", from_the_start)


def lanes_do_not_wait_for_the_tables(patch: Any) -> None:
    import cupy

    from nann.engine.cuda.tables import DeviceTables

    load = DeviceTables.load.__func__

    def at_once(cls: Any, **arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(cupy.cuda.Stream, "synchronize", lambda self: None)
            return load(cls, **arguments)

    patch.setattr(DeviceTables, "load", classmethod(at_once))


EDGES: dict[str, Callable[[Any], None]] = {
    "lane -> XLA: no event before the program": nothing_before_the_program,
    "lane -> XLA: no array of the call is lent anew": no_array_is_lent_anew,
    "XLA -> lane: the scores are read at once": scores_are_read_at_once,
    "XLA -> lane: the tiles are overwritten at once": gathering_beside(edge=False),
    "lane -> XLA: the scores' memory is given back at once": scores_are_not_held,
    "lane -> host: the counts of a step": the_host_does_not_wait("waiting for a step"),
    "lane -> host: the answers": the_host_does_not_wait("reading the answer"),
    "host -> lane: staged inputs are overwritten at once": staged_inputs_are_overwritten_at_once,
    "loading -> lane: the tables": lanes_do_not_wait_for_the_tables,
}


@pytest.mark.parametrize("edge", EDGES)
def test_an_edge_less_is_seen(setting, edge) -> None:
    right = (setting.wanted, setting.wanted)
    assert any(search(setting, seed, EDGES[edge]) != right for seed in MANY_SEEDS)


def test_what_shows_the_edge_of_the_tiles_is_no_harm_with_it(setting) -> None:
    right = (setting.wanted, setting.wanted)
    assert all(search(setting, seed, gathering_beside(edge=True)) == right for seed in SEEDS)


def after_a_broken_search(setting: Setting, seed: int, *, wait: bool) -> str:
    """A search after one whose scorer failed while the device had work left, and the wait for that work."""
    try:
        with fake_gpu(seed) as (cupy, _, xla), pytest.MonkeyPatch.context() as patch:
            lanes = CudaLanes(setting, xla, 1)
            lanes.scorers[0].broken = True
            with pytest.raises(BackendError, match="broken off"):
                lanes.search(0, "filtered scan")
            if not wait:
                patch.setattr(cupy.cuda.Stream, "synchronize", lambda self: None)
            beam = lanes.backends[0].begin(1, with_answer=[None])
            # Its inputs go where those of the other were; as item indices they would be far off any table.
            lanes.backends[0].nearest(beam, np.full((1, DIM), 1e30, np.float32), 5)
        return "right"
    except AssertionError as error:
        return str(error)


def test_a_search_begins_after_what_a_broken_one_left(setting) -> None:
    assert {after_a_broken_search(setting, seed, wait=True) for seed in SEEDS} == {"right"}
    assert {after_a_broken_search(setting, seed, wait=False) for seed in SEEDS} != {"right"}
