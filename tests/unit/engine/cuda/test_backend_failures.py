"""A failing GPU: every error is a BackendError that names the operation, and the next search works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_shim.fixtures import FakeCupy
from cuda_world import BATCH, CudaWorld, on_device, random_admissions, random_gates

from nann.engine.errors import BackendError

RESOURCES = 701  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: this launch failed, and that is all


@pytest.mark.parametrize("skip", range(8))
def test_a_search_that_broke_off_anywhere_leaves_no_trace(fake_cupy: FakeCupy, skip: int) -> None:
    world = CudaWorld()
    admissions = random_admissions(world.rng, BATCH)
    wanted = world.walk(world.lane, admissions)
    fake_cupy.fail_launch(skip=skip, status=RESOURCES)
    with pytest.raises(BackendError, match=r"launching (admit|seed|expand|gather|merge): "):
        world.walk(world.lane, admissions)
    fake_cupy.reset()
    assert world.walk(world.lane, admissions) == wanted


@pytest.mark.parametrize("skip", range(7))
def test_a_gated_search_that_broke_off_anywhere_leaves_no_trace(fake_cupy: FakeCupy, skip: int) -> None:
    world = CudaWorld()
    gates = random_gates(world.rng, BATCH)
    wanted = world.walk(world.lane, [None] * BATCH, gates=gates, admit=5)
    fake_cupy.fail_launch(skip=skip, status=RESOURCES)
    with pytest.raises(BackendError, match=r"launching (seed|estimate|choose|gather|merge): "):
        world.walk(world.lane, [None] * BATCH, gates=gates, admit=5)
    fake_cupy.reset()
    assert world.walk(world.lane, [None] * BATCH, gates=gates, admit=5) == wanted


@pytest.mark.parametrize("late", [False, True])
def test_a_lost_device_is_known_by_its_class(fake_cupy: FakeCupy, late: bool) -> None:
    from nann.engine.errors import DeviceLost

    world = CudaWorld()
    fake_cupy.fail_launch(skip=2, late=late)
    with pytest.raises(DeviceLost, match=r"(launching|waiting|reading).*: device lost, a kernel failed"):
        world.walk(world.lane, [None])
    with pytest.raises(DeviceLost, match="device lost"):
        world.lane.begin(1, with_answer=[None])
    fake_cupy.reset()
    assert world.walk(world.lane, [None]) == world.walk(world.cpu(), [None])


def _seeded(world: CudaWorld) -> tuple[Any, Any]:
    beam = world.lane.begin(2, with_answer=[None, None])
    return beam, world.lane.seed(beam, [np.arange(9, dtype=np.int32)] * 2)


def _take(world: CudaWorld, candidates: Any, fail: Callable[[], None]) -> None:
    """Scores of one call out of two, which are copied."""
    tiles = next(world.lane.gather(candidates, world.grid))
    scores = on_device(np.zeros((tiles.shape.tiles, tiles.shape.rows), np.float32), world.lane.stream)
    fail()
    world.lane.take_scores(candidates, tiles, scores)


OPERATIONS: dict[str, Callable[[CudaWorld, Any, Any, Callable[[], None]], Any]] = {
    "begin": lambda w, _b, _c, fail: (fail(), w.lane.begin(1, with_answer=[None])),
    "begin filtered": lambda w, _b, _c, fail: (
        fail(),
        w.lane.begin(2, with_answer=random_admissions(w.rng, 2)),
    ),
    "begin gated": lambda w, _b, _c, fail: (
        fail(),
        w.lane.begin(2, with_answer=[None, None], gates=random_gates(w.rng, 2)),
    ),
    "seed": lambda w, b, _c, fail: (fail(), w.lane.seed(b, [np.arange(3, dtype=np.int32)] * 2)),
    "nearest": lambda w, b, _c, fail: (fail(), w.lane.nearest(b, np.ones((2, 5), np.float32), 4)),
    "listed": lambda w, b, _c, fail: (fail(), w.lane.listed(b, [np.arange(3, dtype=np.int32)] * 2)),
    "gather": lambda w, _b, c, fail: (fail(), list(w.lane.gather(c, w.grid))),
    "take_scores": lambda w, b, _c, fail: _take(
        w, w.lane.listed(b, [np.arange(150, dtype=np.int32)] * 4), fail
    ),
    "merge_beam": lambda w, b, c, fail: (
        fail(),
        w.lane.merge_beam(b, c, keep=9, capacity=9, width=3, forget=True),
    ),
    "unvisited": lambda w, b, _c, fail: (fail(), w.lane.unvisited(b, 0)),
    "to_host": lambda w, b, _c, fail: (fail(), w.lane.to_host(b, [3, 3])),
    "estimated": lambda w, b, _c, fail: (fail(), b.estimated),
    "nonfinite": lambda w, b, _c, fail: (fail(), b.nonfinite),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_exception_of_cupy_leaves_the_backend(fake_cupy: FakeCupy, operation: str) -> None:
    world = CudaWorld()
    beam, candidates = _seeded(world)
    with pytest.raises(BackendError, match=": "):
        OPERATIONS[operation](world, beam, candidates, fake_cupy.lose_device)
    fake_cupy.reset()
    assert world.walk(world.lane, [None]) == world.walk(world.cpu(), [None])


def test_out_of_memory_says_what_for_and_how_much(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    beam, candidates = _seeded(world)
    world.score(world.lane, candidates)
    fake_cupy.refuse_allocations_over(100_000)
    stage = {"keep": 2**31 - 1, "capacity": 100_000, "width": 3, "forget": False}
    with pytest.raises(
        BackendError, match=r"taking 2097152 bytes for keys: Out of memory allocating 2,097,152"
    ):
        world.lane.merge_beam(beam, candidates, **stage)
    # What was too large is not asked for again, and the lane has room for what it had room for before.
    assert world.walk(world.lane, [None]) == world.walk(world.cpu(), [None])


def test_a_lane_that_does_not_fit_says_so(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    fake_cupy.refuse_allocations_over(5000)
    with pytest.raises(BackendError, match=r"taking \d+ bytes for .*: Out of memory"):
        world.open_lane()


def test_a_kernel_that_does_not_compile_names_file_and_line(
    fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nann.engine.cuda import modules

    whole = modules.source
    monkeypatch.setattr(
        modules, "source", lambda file: whole(file).replace("int const place =", "int const place", 1)
    )
    world = CudaWorld()
    with pytest.raises(BackendError, match=r"compiling expand.cu: (?s:.*)expand\.cu[:(]\d+"):
        _seeded(world)
    monkeypatch.undo()
    _seeded(world)


def test_other_exceptions_are_left_alone(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.errors import device_errors

    for error in (KeyError("x"), MemoryError("the host's"), BackendError("already one")):
        with pytest.raises(type(error)) as raised, device_errors("anything"):
            raise error
        assert raised.value is error
