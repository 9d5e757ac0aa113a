"""Every edge between a lane's stream and XLA's is there: the answer is right in many schedules, and with any
one edge taken away it is wrong, or freed memory is touched, in some.

The lane here is a few operations that read each other's memory; the search is in test_handover_search.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_xla import fake_gpu
from handover_lane import SEEDS, STEPS, TILES, Lane, calls, truth

from nann.engine.cuda.handover import JaxHandover
from nann.engine.errors import BackendError


class Unordered:
    """An array that hands itself over without making anyone wait."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__(stream=-1)


class NothingBeforeTheProgram(JaxHandover):
    def _view(self, array: Any) -> Any:
        return self._from_dlpack(Unordered(array), copy=False)


class OldViewsOnly(JaxHandover):
    def lend(self, first: Any, *others: Any) -> tuple[Any, ...]:
        with self._lane("lending"):
            return tuple(self._cached_view(array) for array in (first, *others))


class NothingBeforeTheScoresAreRead(JaxHandover):
    def take(self, scores: Any) -> Any:
        return super().take(Unordered(scores))


class ScoresAreNotHeld(JaxHandover):
    def take(self, scores: Any) -> Any:
        taken = super().take(scores)
        self._taken = []
        return taken


class ScoresAreHeldTooShort(JaxHandover):
    def lend(self, first: Any, *others: Any) -> tuple[Any, ...]:
        self._read = self._taken = []
        return super().lend(first, *others)


class AnotherStreamIsCurrent(JaxHandover):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._stream = self._cupy.cuda.Stream(non_blocking=True)


class GatherElsewhere(Lane):
    """The second call of a step gathers on another stream, after all it needs but the program before."""

    def gather(self, chunk: int, tiles: int) -> tuple[Any, Any]:
        if chunk == 0:
            self.before = self.stream.record()
            return super().gather(chunk, tiles)
        lane, self.stream = self.stream, self.cupy.cuda.Stream(non_blocking=True)
        self.stream.wait_event(self.before)
        lent = super().gather(chunk, tiles)
        gathered = self.stream.record()
        self.stream = lane
        self.stream.wait_event(gathered)
        return lent


MUTANTS: dict[str, tuple[type[Lane], type[JaxHandover]]] = {
    "lane -> XLA: no event before the program": (Lane, NothingBeforeTheProgram),
    "lane -> XLA: no array of the call is lent anew": (Lane, OldViewsOnly),
    "XLA -> lane: the scores are read at once": (Lane, NothingBeforeTheScoresAreRead),
    "XLA -> lane: the tiles are overwritten at once": (GatherElsewhere, JaxHandover),
    "lane -> XLA: the scores' memory is given back at once": (Lane, ScoresAreNotHeld),
    "lane -> XLA: ... before the next program is enqueued": (Lane, ScoresAreHeldTooShort),
    "the stream of nobody is current": (Lane, AnotherStreamIsCurrent),
}


def search(seed: int, lane: type[Lane] = Lane, handover: type[JaxHandover] = JaxHandover) -> int | str:
    """The answer of a search on a new machine, or what was done that no GPU forgives."""
    try:
        with fake_gpu(seed) as (cupy, machine, xla):
            opened = lane(cupy, machine, xla)
            return opened.search(handover(opened.stream))
    except AssertionError as error:
        return str(error)


def test_the_answer_is_right_in_every_schedule() -> None:
    assert {search(seed) for seed in SEEDS} == {truth()}


@pytest.mark.parametrize("name", MUTANTS)
def test_an_edge_less_is_seen(name) -> None:
    lane, handover = MUTANTS[name]
    found = [search(seed, lane, handover) for seed in SEEDS]
    assert any(answer != truth() for answer in found)


def test_an_array_is_viewed_once_and_lent_in_order_ever_after() -> None:
    with fake_gpu(0) as (cupy, machine, xla):
        lane = Lane(cupy, machine, xla)
        handover = JaxHandover(lane.stream)
        lane.search(handover)
        n_calls = sum(len(calls(step)) for step in range(STEPS))
        assert xla.imported == n_calls + len(TILES)  # tile_query of each call, items of each shape
        lane.search(handover)
        assert xla.imported == 2 * n_calls + len(TILES)


def test_a_call_that_fails_leaves_the_next_one_in_order() -> None:
    for seed in SEEDS:
        with fake_gpu(seed) as (cupy, machine, xla):
            lane = Lane(cupy, machine, xla)
            handover = JaxHandover(lane.stream)
            handover.lend(*lane.gather(0, 2))  # and its program is never run
            assert lane.search(handover) == truth()


def test_views_of_replaced_memory_are_let_go(monkeypatch) -> None:
    from nann.engine.cuda import handover as module

    monkeypatch.setattr(module, "_MOST_VIEWS", 3)
    with fake_gpu(0) as (cupy, machine, _):
        handover = JaxHandover(cupy.cuda.Stream(non_blocking=True))
        with handover._stream:
            before = machine.devices[0].budget.used
            for _ in range(20):
                handover.lend(cupy.empty((4,), np.int32), cupy.empty((64,), np.float32))
            machine.drain()
            machine.collect()
        assert machine.devices[0].budget.used - before <= (3 + 2) * 512


@pytest.mark.parametrize(
    ("dtype", "elements", "offset"), [(np.int64, 8, 0), (np.float64, 8, 0), (np.float16, 8, 4)], ids=str
)
def test_what_xla_would_copy_or_refuse_is_refused(dtype, elements, offset) -> None:
    with fake_gpu(0) as (cupy, _, _):
        stream = cupy.cuda.Stream(non_blocking=True)
        handover = JaxHandover(stream)
        with stream:
            good, bad = cupy.empty((8,), np.int32), cupy.empty((64,), dtype)[offset : offset + elements]
        with pytest.raises(BackendError, match="XLA cannot take"):
            handover.lend(good, bad)
        with pytest.raises(BackendError, match="XLA cannot take"):
            handover.lend(bad, good)


def test_a_lost_device_is_a_backend_error() -> None:
    with fake_gpu(0) as (cupy, machine, xla):
        lane = Lane(cupy, machine, xla)
        handover = JaxHandover(lane.stream)
        tiles = lane.gather(0, 2)
        machine.lose(machine.devices[0], 719)
        with pytest.raises(BackendError, match="lending arrays to XLA: device lost"):
            handover.lend(*tiles)


def test_a_program_that_failed_is_a_backend_error() -> None:
    from jax.errors import JaxRuntimeError

    class Failed:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, **_: Any) -> Any:
            raise JaxRuntimeError("INTERNAL: the program failed\nand more")

    with fake_gpu(0) as (cupy, _, _):
        handover = JaxHandover(cupy.cuda.Stream(non_blocking=True))
        with pytest.raises(BackendError, match=r"^taking the scores from XLA: INTERNAL: the program failed$"):
            handover.take(Failed())
