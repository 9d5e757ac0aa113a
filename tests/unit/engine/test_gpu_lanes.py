"""Lanes on GPUs, on the stand-in for CuPy: what is shared, who is numbered how, and what does not fit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_shim.fixtures import FakeCupy, fake_cupy
from engine_world import IntegerScorer, World, make_world

from nann.engine import gpu_lanes
from nann.engine.artifacts import Artifact, GateSpec
from nann.engine.backend import Tiles
from nann.engine.devices import DeviceMemory, OpenedLanes, choose_devices, open_lanes, parse_devices
from nann.engine.errors import BackendError, Unsupported
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.service.batcher import Batcher, BatcherLimits

__all__ = ["fake_cupy"]

TWO_GPUS = {"n_devices": 2}


class DeviceScorer(IntegerScorer):
    """Takes tiles of device arrays through the host, waiting for everything."""

    def __init__(self, item_vectors: np.ndarray, grid: BucketGrid, gpu: int, lane: int, stream: Any) -> None:
        super().__init__(item_vectors, max_batch=grid.max_batch)
        self.grid, self.gpu, self.lane, self.stream = grid, gpu, lane, stream

    def score(self, users: Any, tiles: Tiles) -> Any:
        import cupy

        assert self.stream.device_id == self.gpu
        tile_query = None if tiles.tile_query is None else tiles.tile_query.get(stream=self.stream)
        items = {name: array.get(stream=self.stream) for name, array in tiles.items.items()}
        self.stream.synchronize()
        scores = super().score(users, Tiles(tiles.shape, tile_query, items))
        with self.stream:
            on_device = cupy.empty(scores.shape, dtype=np.float32)
        on_device.set(scores, stream=self.stream)
        return on_device


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "version", num_items=150)


@pytest.fixture
def lanes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenedLanes]:
    """`open_lanes` with a scorer that needs no XLA; `artifact` as loaded."""

    def open_scorers(_artifact: Any, gpus: Any, *, max_batch: int, **_: Any) -> Any:
        grid = BucketGrid(max_batch=max_batch, max_rows=512, tile_rows=64, wide=False)

        def of(gpu: int) -> Any:
            return grid, lambda lane, stream: DeviceScorer(world.item_vectors, grid, gpu, lane, stream)

        return [of(gpu) for gpu in gpus]

    monkeypatch.setattr(gpu_lanes, "_pjrt", open_scorers)

    def on(devices: str, *, lanes: int = 2, **options: Any) -> OpenedLanes:
        artifact = Artifact.open(world.directory)
        return open_lanes(artifact, parse_devices(devices), lanes=lanes, max_batch=4, **options)

    return on


def engine_of(world: World, lanes: OpenedLanes) -> SearchEngine:
    artifact = Artifact.open(world.directory)
    return SearchEngine(artifact, lanes.pairs, max_batch=4, lane_devices=lanes.devices)


def answers(engine: SearchEngine, world: World, lane: int) -> list[Any]:
    histories = [tuple(world.item_ids[[i, i + 7, i + 20]].tolist()) for i in range(4)]
    found = []
    for params in (SearchParams(ef=40, beam_width=8), SearchParams(policy="exhaustive")):
        batch = [engine.check(Query(k=20, params=params, history=history)) for history in histories]
        found += [(hits.item_ids, hits.scores) for hits in engine.search(batch, lane)]
    return found


@pytest.mark.parametrize("fake_cupy", [TWO_GPUS], indirect=True)
def test_lanes_are_numbered_gpu_by_gpu_and_share_the_tables_of_theirs(
    fake_cupy: FakeCupy, lanes_on: Any
) -> None:
    opened = lanes_on("cuda:1,cuda:0")
    assert (opened.devices, opened.scorer) == (("cuda:1", "cuda:1", "cuda:0", "cuda:0"), "pjrt")
    scorers = [scorer for _, scorer in opened.pairs]
    assert [(scorer.gpu, scorer.lane) for scorer in scorers] == [(1, 0), (1, 1), (0, 0), (0, 1)]
    backends = [backend for backend, _ in opened.pairs]
    assert [scorer.stream for scorer in scorers] == [backend.stream for backend in backends]
    assert len({backend.stream.ptr for backend in backends}) == 4
    tables = [backend._tables for backend in backends]
    assert tables[0] is tables[1]
    assert tables[2] is tables[3]
    assert (tables[0].device, tables[2].device) == (1, 0)


@pytest.mark.parametrize("fake_cupy", [{**TWO_GPUS, "seed": seed} for seed in range(3)], indirect=True)
def test_every_lane_of_every_gpu_answers_as_the_cpu_does(
    fake_cupy: FakeCupy, lanes_on: Any, world: World
) -> None:
    engine = engine_of(world, lanes_on("cuda:0,cuda:1"))
    assert engine.warm_up().bit_equal
    assert engine.lane_devices == ("cuda:0", "cuda:0", "cuda:1", "cuda:1")
    expected = answers(world.engine(), world, 0)
    for lane in range(engine.n_lanes):
        assert answers(engine, world, lane) == expected


def test_a_version_with_a_gate_has_it_on_the_gpu(
    fake_cupy: FakeCupy, lanes_on: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, rng = Artifact.open(world.directory), np.random.default_rng(0)
    rows = rng.normal(size=(2, plain.num_items, 1 + 4 + 2)).astype(np.float16)
    spec = GateSpec(dim=4, context_dim=2, residual_weight=0.75, rmse=0.5)
    manifest = plain.manifest.model_copy(update={"gate": spec})
    gated = replace(plain, manifest=manifest, gate_keys=rows[0], gate_queries=rows[1])
    monkeypatch.setattr(Artifact, "open", lambda *_, **__: gated)
    params = SearchParams(ef=10, beam_width=8, gate_width=5, gate_margin=1.0)
    found = []
    for engine in (engine_of(world, lanes_on("cuda:0", lanes=1)), world.engine()):
        batch = [
            engine.check(Query(k=10, params=params, history=tuple(world.item_ids[[i, i + 7]].tolist())))
            for i in range(4)
        ]
        hits = engine.search(batch, 0)
        found.append([(one.item_ids, one.scores, one.explain["estimated"]) for one in hits])
    assert found[0] == found[1]
    assert min(estimated for *_, estimated in found[0]) > 0


@pytest.mark.parametrize("fake_cupy", [TWO_GPUS], indirect=True)
def test_a_gpu_that_is_lost_leaves_the_other_alone(fake_cupy: FakeCupy, lanes_on: Any, world: World) -> None:
    engine = engine_of(world, lanes_on("cuda:0,cuda:1", lanes=1))
    expected = answers(engine, world, 1)
    fake_cupy.lose_device(0)
    with pytest.raises(BackendError, match="device lost"):
        answers(engine, world, 0)
    assert answers(engine, world, 1) == expected
    fake_cupy.reset(0)
    assert answers(engine, world, 0) == expected


@pytest.mark.parametrize("fake_cupy", [TWO_GPUS], indirect=True)
async def test_a_gpu_is_lost_and_comes_back_behind_the_batcher(
    fake_cupy: FakeCupy, lanes_on: Any, world: World
) -> None:
    engine = engine_of(world, lanes_on("cuda:0,cuda:1"))
    engine.warm_up()
    proven: list[int] = []
    limits = BatcherLimits(
        n_lanes=4,
        max_batch=4,
        queue_limit=100,
        queue_work_limit=10**9,
        batch_work_limit=10**9,
        lane_groups=engine.lane_devices,
    )
    batcher: Batcher[Any, Any] = Batcher(engine.search, limits, on_lanes=proven.append)

    def query(number: int) -> Any:
        history = tuple(world.item_ids[[number, number + 3]].tolist())
        return engine.check(Query(k=5, params=SearchParams(ef=20), history=history))

    async def failures() -> list[str]:
        answers = (batcher.submit(query(number)) for number in range(16))
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        return [str(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]

    assert await failures() == []
    fake_cupy.lose_device(0)
    lost = await failures()
    assert 1 <= len(lost) <= 8  # the batches that its two lanes had
    assert all("device lost" in text for text in lost)
    assert (await failures(), proven) == ([], [2])
    with pytest.raises(BackendError, match="device lost"):
        await batcher.probe(query(0), deadline_s=float("inf"))
    fake_cupy.reset(0)
    await batcher.probe(query(0), deadline_s=float("inf"))
    assert (await failures(), proven) == ([], [2, 3, 4])
    await batcher.close()


def test_what_does_not_fit_is_named_before_anything_is_taken(fake_cupy: FakeCupy, lanes_on: Any) -> None:
    before = fake_cupy.count("allocations")
    with pytest.raises(BackendError) as refused:
        lanes_on("cuda:0", memory=DeviceMemory(limit=4096))
    for words in (
        "graph level 0",
        "item tensor item_vector",
        "2 x tiles for the scorer",
        "over the limit of 4.00 KiB",
    ):
        assert words in str(refused.value)
    assert fake_cupy.count("allocations") == before
    with pytest.raises(BackendError, match=r"reserved for XLA .* on cuda:0, where .* are free"):
        fake_cupy.occupy(fake_cupy.machine.devices[0].budget.total - (64 << 20))
        lanes_on("cuda:0")


def test_the_limit_holds_for_everything_of_this_process_on_the_gpu(
    fake_cupy: FakeCupy, lanes_on: Any
) -> None:
    pool = fake_cupy.cupy.get_default_memory_pool()
    lanes_on("cuda:0", memory=DeviceMemory(limit=1 << 30))
    assert pool.get_limit() == 1 << 30
    lanes_on("cuda:0", memory=DeviceMemory(limit=0.5))
    assert pool.get_limit() == fake_cupy.machine.devices[0].budget.total // 2
    lanes_on("cuda:0")
    assert pool.get_limit() == 0


def test_kernels_are_kept_where_the_setting_says(
    fake_cupy: FakeCupy, lanes_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", "elsewhere")
    lanes_on("cuda:0", kernel_cache_dir=tmp_path / "a" / "b")
    assert os.environ["CUPY_CACHE_DIR"] == str(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(Unsupported, match="--kernel-cache-dir"):
        lanes_on("cuda:0", kernel_cache_dir=tmp_path / "file" / "b")


def test_auto_sees_the_gpu_that_cupy_shows(fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    from nann.engine import devices

    monkeypatch.setattr(devices, "_installed", lambda _name: True)
    chosen, reason = choose_devices("auto")
    assert chosen == parse_devices("cuda:0")
    assert reason.startswith("cuda:0: Shim (CPU), ")
    with pytest.raises(Unsupported, match="there is no cuda:1"):
        choose_devices("cuda:1")
