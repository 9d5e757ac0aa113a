"""A lane takes its memory once, and more only for a request larger than any before."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim.fixtures import FakeCupy
from cuda_world import BATCH, GRID, CudaWorld, on_device, random_admissions, random_gates

from nann.engine.scoring.buckets import BucketGrid

I32 = np.int32


@pytest.mark.parametrize("fake_cupy", range(2), indirect=True)
def test_the_second_search_of_a_kind_takes_no_memory(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.lane_memory import LaneLimits

    world = CudaWorld(limits=LaneLimits(capacity=4, width=1, candidates=4))
    admissions = random_admissions(world.rng, BATCH)
    world.walk(world.lane, admissions, capacity=200, width=50)
    assert world.lane.n_growths > 0
    grown = world.lane.n_growths
    beam = world.lane.begin(BATCH, with_answer=admissions)
    candidates = world.lane.seed(beam, [np.arange(60, dtype=I32)] * BATCH)
    scores = on_device(np.zeros((16, 32), np.float32), world.lane.stream)  # the scorer's, not the lane's
    before = fake_cupy.count("allocations"), fake_cupy.count("pinned allocations")
    for capacity, width in [(200, 50), (30, 7)]:
        (tiles,) = world.lane.gather(candidates, GRID)
        world.lane.take_scores(candidates, tiles, scores[: tiles.shape.tiles])
        world.lane.merge_beam(beam, candidates, keep=99, capacity=capacity, width=width, forget=True)
        candidates = world.lane.expand(beam, 0)
        world.lane.to_host(beam, [20] * BATCH)
    assert (fake_cupy.count("allocations"), fake_cupy.count("pinned allocations")) == before
    assert world.lane.n_growths == grown


@pytest.mark.parametrize("fake_cupy", range(2), indirect=True)
def test_gates_larger_than_the_lane_has_room_for_make_room(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.lane_memory import LaneLimits

    world = CudaWorld(limits=LaneLimits(capacity=64, width=16, candidates=8, gate_bytes=16))
    gates = random_gates(world.rng, BATCH)
    for grown in (True, False):
        before = world.lane.n_growths
        found = world.walk(world.lane, [None] * BATCH, gates=gates, admit=5)
        assert found == world.walk(world.cpu(), [None] * BATCH, gates=gates, admit=5)
        assert (world.lane.n_growths > before) is grown


@pytest.mark.parametrize("fake_cupy", range(4), indirect=True)
def test_buffers_grow_under_work_that_still_uses_them(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.lane_memory import LaneLimits

    world = CudaWorld(limits=LaneLimits(capacity=1, width=1, candidates=1), num_items=700)
    cpu = world.cpu()
    beam, wanted = (b.begin(BATCH, with_answer=[None] * BATCH) for b in (world.lane, cpu))
    rows = [np.arange(b, b + 2, dtype=I32) for b in range(BATCH)]
    candidates, expected = world.lane.seed(beam, rows), cpu.seed(wanted, rows)
    for capacity, width in [(3, 2), (9, 5), (40, 21), (200, 90), (33, 33)]:
        stage = {"keep": 2**31 - 1, "capacity": capacity, "width": width, "forget": False}
        for backend, of, mine in ((world.lane, beam, candidates), (cpu, wanted, expected)):
            world.score(backend, mine)
            backend.merge_beam(of, mine, **stage)
        candidates, expected = world.lane.expand(beam, 0), cpu.expand(wanted, 0)
        found, answer = world.lane.to_host(beam, [200] * BATCH), cpu.to_host(wanted, [200] * BATCH)
        for one, other in zip(found, answer, strict=True):
            np.testing.assert_array_equal(one, other)
        if expected is None:
            assert candidates is None
            break
    assert world.lane.n_growths >= 5


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
def test_inputs_larger_than_the_staging_memory_arrive_whole(
    fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits between the transfers, so that the staging memory is used again under them."""
    from nann.engine.cuda import lane_memory

    monkeypatch.setattr(lane_memory, "_STAGED_BYTES", 256)
    stream = fake_cupy.cupy.cuda.Stream(non_blocking=True)
    memory = lane_memory.LaneMemory(stream, {"inputs": (np.uint8, 64)})
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 99, n).astype(I32) for n in (5, 20, 3, 30, 30, 30, 400, 10, 300, 20, 7, 300, 90)
    ]
    places = [memory.new("a place", array.size, I32) for array in arrays]
    for place, array in zip(places, arrays, strict=True):
        memory.upload_to(place.data.ptr, array)
    for place, array in zip(places, arrays, strict=True):
        np.testing.assert_array_equal(place.get(stream=stream), array)
    assert memory.n_growths == 1


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
def test_inputs_grow_under_a_merge_that_still_reads_the_old_ones(
    fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nann.engine.cuda import lane_memory

    monkeypatch.setattr(lane_memory, "_STAGED_BYTES", 64)
    world = CudaWorld()
    beam = world.lane.begin(2, with_answer=[None, None])
    for start, stop in [(0, 3), (3, 30), (30, 150)]:
        candidates = world.lane.listed(beam, [np.arange(start, stop, dtype=I32)] * 2)
        world.score(world.lane, candidates)
        world.lane.merge_beam(beam, candidates, keep=2**31 - 1, capacity=20, width=0, forget=False)
    for b, (items, _) in enumerate(world.lane.to_host(beam, [20, 20])):
        assert items.tolist() == np.lexsort((np.arange(150), -world.scores[b]))[:20].tolist()


def test_a_buffer_is_given_back_before_a_larger_one_is_taken(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.lane_memory import LaneMemory

    budget = fake_cupy.machine.devices[0].budget
    stream = fake_cupy.cupy.cuda.Stream(non_blocking=True)
    memory = LaneMemory(stream, {"inputs": (np.uint8, 1 << 20)})
    fake_cupy.occupy(budget.total - (2 << 20))
    assert memory.at_least("inputs", (1 << 20) + 1).size == 2 << 20


def test_the_plan_counts_what_a_lane_takes(fake_cupy: FakeCupy) -> None:
    from nann.engine.cuda.lane_memory import LaneLimits

    grid = BucketGrid(max_batch=BATCH, max_rows=4096, wide=False, crossed_rows=64)
    limits = LaneLimits(capacity=300, width=40, candidates=500)
    world = CudaWorld(grid=grid, num_items=5000)
    pool = fake_cupy.cupy.get_default_memory_pool()
    before = pool.used_bytes()
    lane = world.open_lane(limits)
    taken = pool.used_bytes() - before
    planned = sum(limits.plan(grid, 5000, world.item_state, scans=True, gated=True).values())
    assert planned <= taken <= 1.02 * planned + 512 * 40  # the pool gives whole units of 512 bytes
    del lane
