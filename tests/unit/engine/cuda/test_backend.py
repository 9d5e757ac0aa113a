"""The CUDA backend on the stand-in for CuPy: whole searches against the CPU's, and the ways only it has.

The contract suite holds each primitive against plain Python.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL
from cuda_shim.fixtures import FakeCupy
from cuda_world import BATCH, GRID, NO_LIMIT, CudaWorld, on_device, random_admissions, random_gates

from nann.engine.backend import Admission, Tiles
from nann.engine.scoring.buckets import BucketGrid, Shape

I32 = np.int32
CROSSED = BucketGrid(max_batch=BATCH, max_rows=512, wide=False, crossed_rows=32)
STAGES = [
    {},
    {"keep": 9, "capacity": 15, "width": 20},
    {"capacity": 100, "forgets": (0, 1), "k": 40},
    {"capacity": 12, "forgets": (0, 1), "k": 12, "keep": 7},
    {"capacity": 1, "width": 0},
]


@pytest.mark.parametrize("fake_cupy", range(4), indirect=True)
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_searches_are_those_of_the_cpu(fake_cupy: FakeCupy, batch: int, stage: dict) -> None:
    world = CudaWorld(batch)
    world.scores[0, ::11] = np.nan
    for admissions in ([None] * batch, random_admissions(world.rng, batch)):
        assert world.walk(world.lane, admissions, **stage) == world.walk(world.cpu(), admissions, **stage)


@pytest.mark.parametrize("fake_cupy", range(4), indirect=True)
@pytest.mark.parametrize("admit", [1, 6, 40])
def test_gated_searches_are_those_of_the_cpu(fake_cupy: FakeCupy, admit: int) -> None:
    world = CudaWorld(admit)
    for stage in STAGES:
        for admissions in ([None] * BATCH, random_admissions(world.rng, BATCH)):
            gated = {"gates": random_gates(world.rng, BATCH), "admit": admit, **stage}
            found = world.walk(world.lane, admissions, **gated)
            assert found == world.walk(world.cpu(), admissions, **gated)
    assert fake_cupy.count("launch choose") > 4


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
def test_lanes_that_take_turns_do_not_see_each_other(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    lanes = [world.lane, world.open_lane()]
    beams = [lane.begin(2, with_answer=[None, None]) for lane in lanes]
    seeds = [[np.arange(5, dtype=I32), np.arange(9, dtype=I32)], [np.arange(70, 99, dtype=I32)] * 2]
    candidates = [lane.seed(beam, rows) for lane, beam, rows in zip(lanes, beams, seeds, strict=True)]
    for _ in range(4):
        for lane, mine in zip(lanes, candidates, strict=True):
            world.score(lane, mine)
        for lane, beam, mine in zip(lanes, beams, candidates, strict=True):
            lane.merge_beam(beam, mine, keep=NO_LIMIT, capacity=30, width=4, forget=False)
        candidates = [lane.expand(beam, 0) for lane, beam in zip(lanes, beams, strict=True)]
    for lane, beam, rows in zip(lanes, beams, seeds, strict=True):
        alone = world.cpu()
        wanted = alone.begin(2, with_answer=[None, None])
        mine = alone.seed(wanted, rows)
        for _ in range(4):
            world.score(alone, mine)
            alone.merge_beam(wanted, mine, keep=NO_LIMIT, capacity=30, width=4, forget=False)
            mine = alone.expand(wanted, 0)
        assert beam.scored_per_step.tolist() == wanted.scored_per_step.tolist()
        for found, expected in zip(lane.to_host(beam, [9, 9]), alone.to_host(wanted, [9, 9]), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fake_cupy", range(2), indirect=True)
def test_an_item_scored_again_after_forget_is_answered_once(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    world.scores[0, [2, 3, 4, 5, 6]] = 3, 1, 1, 2, 1
    allowed = np.isin(np.arange(150), [3, 4, 5, 6])
    beam = world.lane.begin(1, with_answer=[Admission(allowed, np.empty(0, I32), 4)])
    for rows, capacity in [([2, 3, 4, 5, 6], 2), ([3, 4], 9)]:
        candidates = world.lane.seed(beam, [np.array(rows, I32)])
        assert candidates.counts.tolist() == [len(rows)]
        world.score(world.lane, candidates)
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=capacity, width=0, forget=True)
    ((items, scores),) = world.lane.to_host(beam, [3])
    assert (items.tolist(), scores.tolist()) == ([5, 3, 4], [2, 1, 1])


def test_a_frontier_may_be_wider_than_the_last_step_was_rich(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    beam = world.lane.begin(1, with_answer=[None])
    candidates = world.lane.seed(beam, [np.arange(30, dtype=I32)])
    for width in (1, 25):
        world.score(world.lane, candidates)
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=60, width=width, forget=False)
        if width == 1:
            candidates = world.lane.expand(beam, 0)
            assert candidates.counts[0] < 25
    assert beam.width == 25
    fake_cupy.cupy.cuda.Device().synchronize()
    assert fake_cupy.peek(beam.frontier)[:25].max() < 150


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
def test_work_beyond_the_largest_shape_is_scored_in_several_calls(fake_cupy: FakeCupy) -> None:
    world = CudaWorld(num_items=900)
    rng = np.random.default_rng(1)
    rows = [rng.permutation(900)[:n].astype(I32) for n in (700, 0, 33, 512)]
    beam = world.lane.begin(BATCH, with_answer=[None] * BATCH)
    candidates = world.lane.listed(beam, rows)
    assert world.score(world.lane, candidates) == 3  # 22 + 2 + 16 tiles, 16 a call
    world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=600, width=0, forget=False)
    for b, (items, scores) in enumerate(world.lane.to_host(beam, [600] * BATCH)):
        wanted = sorted(rows[b].tolist(), key=lambda item: (-world.scores[b, item], item))[:600]
        assert items.tolist() == wanted
        assert scores.tolist() == world.scores[b, wanted].tolist()


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
@pytest.mark.parametrize("step", [20, 32, 64, 100, 150])
def test_a_scan_of_a_common_range_scores_views_of_the_tables(fake_cupy: FakeCupy, step: int) -> None:
    world = CudaWorld(grid=CROSSED)
    world.scores[1, 5] = np.inf
    gathers = fake_cupy.count("launch gather")
    beam = world.lane.begin(3, with_answer=[None] * 3)
    for start in range(0, 150, step):
        common = range(start, min(start + step, 150))
        candidates = world.lane.listed(beam, [common] * 3)
        assert world.score(world.lane, candidates) == -(-len(common) // 32)
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=70, width=0, forget=False)
    assert fake_cupy.count("launch gather") == gathers
    for b, (items, _) in enumerate(world.lane.to_host(beam, [70] * 3)):
        finite = np.where(np.isfinite(world.scores[b]), world.scores[b], -np.inf)
        assert items.tolist() == np.lexsort((np.arange(150), -finite))[:70].tolist()
    assert beam.nonfinite.tolist() == [0, 1, 0]
    assert beam.scored_per_step.shape == (0, 3)


def test_crossed_tiles_are_padded_with_zeros_at_the_end_of_the_tables(fake_cupy: FakeCupy) -> None:
    world = CudaWorld(grid=CROSSED)
    beam = world.lane.begin(1, with_answer=[None])
    *_, last = world.lane.gather(world.lane.listed(beam, [range(100, 150)]), CROSSED)
    assert last.shape == Shape(BATCH, 32)
    assert {name: view.shape for name, view in last.items.items()} == {
        "wide": (1, 32, 8),
        "odd": (1, 32, 3),
        "number": (1, 32),
    }
    number = last.items["number"].get(stream=world.lane.stream)[0]
    assert number.tolist() == [*range(133, 151), *[0] * 14]


def test_queries_that_differ_are_scanned_in_tiles(fake_cupy: FakeCupy) -> None:
    world = CudaWorld(grid=CROSSED)
    beam = world.lane.begin(3, with_answer=[None] * 3)
    rows = [range(10, 90), np.array([3, 1, 140], I32), range(0, 0)]
    candidates = world.lane.listed(beam, rows)
    world.score(world.lane, candidates)
    world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=90, width=0, forget=False)
    for b, (items, _) in enumerate(world.lane.to_host(beam, [90] * 3)):
        assert sorted(items.tolist()) == sorted(rows[b])


@pytest.mark.parametrize("fake_cupy", range(2), indirect=True)
@pytest.mark.parametrize("count", [1, 40, 150, 400])
def test_the_nearest_of_a_scan_in_parts_are_those_of_the_cpu(
    fake_cupy: FakeCupy, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nann.engine.cuda import backend

    monkeypatch.setattr(backend, "_SCAN_ROWS", 64)
    world = CudaWorld(3)
    vectors = world.rng.integers(-2, 3, (BATCH, 5)).astype(np.float32)
    cpu = world.cpu()
    for repeat in range(2):
        beam, wanted = (b.begin(BATCH, with_answer=[None] * BATCH) for b in (world.lane, cpu))
        candidates = world.lane.nearest(beam, vectors, count)
        cpu.nearest(wanted, vectors, count)
        assert candidates.counts.tolist() == [min(count, 150)] * BATCH
        for b in range(BATCH):
            assert world.lane.unvisited(beam, b).tolist() == cpu.unvisited(wanted, b).tolist(), repeat
        assert beam.nonfinite.tolist() == [0] * BATCH


def test_a_step_is_three_launches_and_one_transfer_to_the_host(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    before = world.lane.launches
    copies = fake_cupy.count("copies")
    beam = world.lane.begin(2, with_answer=[None, None])
    candidates = world.lane.seed(beam, [np.arange(9, dtype=I32)] * 2)
    assert world.lane.launches - before == 1
    assert fake_cupy.count("copies") - copies == 1  # the seeds
    for step in range(3):
        calls = world.lane.launches, fake_cupy.count("launches")
        (tiles,) = world.lane.gather(candidates, GRID)
        scores = on_device(np.zeros((tiles.shape.tiles, 32), np.float32), world.lane.stream)
        copies = fake_cupy.count("copies")
        world.lane.take_scores(candidates, tiles, scores)
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=30, width=4, forget=False)
        candidates = world.lane.expand(beam, 0)
        assert (world.lane.launches - calls[0], fake_cupy.count("launches") - calls[1]) == (3, 3), step
        assert fake_cupy.count("copies") == copies
    world.lane.to_host(beam, [5, 5])
    assert fake_cupy.count("copies") == copies + 2  # counters and keys


def test_a_gated_step_is_one_launch_more(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    copies = fake_cupy.count("copies")
    beam = world.lane.begin(2, with_answer=[None, None], gates=random_gates(world.rng, 2))
    assert fake_cupy.count("copies") - copies == 1  # the gates
    candidates = world.lane.seed(beam, [np.arange(9, dtype=I32)] * 2)
    for step in range(3):
        before = world.lane.launches
        (tiles,) = world.lane.gather(candidates, GRID)
        scores = on_device(np.zeros((tiles.shape.tiles, 32), np.float32), world.lane.stream)
        copies = fake_cupy.count("copies")
        world.lane.take_scores(candidates, tiles, scores)
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=30, width=4, forget=False)
        candidates = world.lane.expand(beam, 0, admit=9)
        assert world.lane.launches - before == 4, step
        assert fake_cupy.count("copies") == copies
    world.lane.to_host(beam, [5, 5])
    assert beam.estimated.min() > 0
    assert fake_cupy.count("copies") == copies + 2  # counters and keys


def test_what_a_gate_counts_is_read_when_it_is_asked_for(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    beam = world.lane.begin(1, with_answer=[None], gates=random_gates(world.rng, 1))
    candidates = world.lane.seed(beam, [np.arange(30, dtype=I32)])
    for _ in range(3):
        world.score(world.lane, candidates)
        before = beam.estimated[0]
        world.lane.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=30, width=4, forget=False)
        assert beam.estimated[0] == before
        candidates = world.lane.expand(beam, 0, admit=9)
        assert beam.estimated[0] > before


def test_a_gate_too_wide_for_a_whole_block_takes_smaller_ones(fake_cupy: FakeCupy) -> None:
    world = CudaWorld(gate_dim=70, sizes=REAL)
    gates = random_gates(world.rng, BATCH, dim=70)
    found = world.walk(world.lane, [None] * BATCH, gates=gates, admit=5)
    assert found == world.walk(world.cpu(), [None] * BATCH, gates=gates, admit=5)


def test_nothing_is_compiled_before_the_first_launch(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    assert fake_cupy.count("compilations") == 0
    world.lane.seed(world.lane.begin(1, with_answer=[None]), [np.arange(3, dtype=I32)])
    files = fake_cupy.count("compilations")
    world.walk(world.open_lane(), [None])
    assert fake_cupy.count("compilations") == files == 7


def test_what_does_not_belong_together_is_refused(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    beam = world.lane.begin(1, with_answer=[None])
    candidates = world.lane.seed(beam, [np.arange(40, dtype=I32)])
    for grid in (
        BucketGrid(max_batch=BATCH, max_rows=1024, wide=False),
        BucketGrid(max_batch=BATCH, max_rows=512, tile_rows=64, wide=False),
    ):
        with pytest.raises(ValueError, match="another grid"):
            next(world.lane.gather(candidates, grid))
    (tiles,) = world.lane.gather(candidates, GRID)
    for shape, dtype in [((1, 32), np.float32), ((tiles.shape.tiles, 32), np.float16)]:
        with pytest.raises(ValueError, match="cannot be"):
            world.lane.take_scores(candidates, tiles, on_device(np.zeros(shape, dtype), world.lane.stream))


def test_masks_stay_on_the_device_and_are_sent_once(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    mask = world.rng.random(150) < 0.5
    admission = Admission(mask, np.array([3], I32), 1)

    def copies_to_begin(admissions: list[Admission]) -> int:
        before = fake_cupy.count("copies")
        world.lane.begin(len(admissions), with_answer=admissions)
        return fake_cupy.count("copies") - before

    inputs = 2  # which queries are filtered; what they exclude
    assert copies_to_begin([admission]) == inputs + 1
    assert copies_to_begin([admission, Admission(mask, np.empty(0, I32), 1)]) == inputs
    others = [Admission(world.rng.random(150) < 0.5, np.empty(0, I32), 1) for _ in range(24)]
    for start in range(0, 24, 3):
        assert copies_to_begin(others[start : start + 3]) == inputs + 3
        assert copies_to_begin([admission]) == inputs  # in use all the time
    assert copies_to_begin([others[-1]]) == inputs
    assert copies_to_begin([others[0]]) == inputs + 1  # out of use for longest


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
def test_one_batch_may_bring_more_masks_than_are_kept(
    fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nann.engine.cuda import lane_memory

    monkeypatch.setattr(lane_memory, "_MASKS_KEPT", 2)
    world = CudaWorld()
    masks = [world.rng.random(150) < 0.5 for _ in range(BATCH)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 3]):
        admissions = [Admission(masks[i], np.array([7], I32), 1) for i in order]
        assert world.walk(world.lane, admissions) == world.walk(world.cpu(), admissions)


def test_tiles_are_views_that_are_made_once(fake_cupy: FakeCupy) -> None:
    world = CudaWorld()
    seen: list[Tiles] = []
    for _ in range(2):
        beam = world.lane.begin(1, with_answer=[None])
        seen += world.lane.gather(world.lane.listed(beam, [np.arange(40, dtype=I32)]), GRID)
    assert seen[0].items is seen[1].items
    assert seen[0].tile_query is seen[1].tile_query
    assert SMALL.gather_rows < GRID.tile_rows  # a tile is several blocks here
