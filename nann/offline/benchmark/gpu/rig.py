"""Opens what is measured: the model's programs on one device, and engines over the made-up world."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.devices import Device, DeviceMemory, cpu_lanes, threads_per_lane
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.scoring.pjrt_programs import Interface, PjrtPrograms
from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer
from nann.engine.search_engine import SearchEngine
from nann.offline.benchmark.gpu.corpus import HISTORY_LENGTH
from nann.offline.benchmark.gpu.measure import Bench
from nann.offline.benchmark.gpu.model import Weights
from nann.offline.benchmark.gpu.programs import ModelFunctions, Precision
from nann.offline.benchmark.gpu.world import World

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["accept_installed_jax", "compile_all", "open_bench", "open_programs"]

# For a GPU what `nann export` publishes by default; for the CPU a small grid of the same kind, so that a
# rehearsal runs what a GPU runs.
_GPU_MAX_ROWS, _GPU_TILE_ROWS = 131072, 64
_CPU_MAX_ROWS, _CPU_TILE_ROWS = 16384, 32
_XLA_MEMORY_SHARE = 0.5
_MAX_K = 1000


def accept_installed_jax() -> str:
    """Measure with whatever JAX is installed; returns its version.

    Exported programs are promised to run with one version of JAX; programs of functions, which the JAX
    that is there has traced itself, only need its internals to have kept their names.
    """
    import jax

    from nann.engine.scoring import pjrt_client

    version: str = jax.__version__
    pjrt_client.PJRT_JAX_VERSION = version
    return version


def open_programs(
    device: Device,
    weights: Weights,
    embeddings: Float32[np.ndarray, "N 64"],
    *,
    precision: Precision,
    batch: int,
    lanes: int,
    tile_rows: int | None = None,
    max_rows: int | None = None,
) -> PjrtPrograms:
    """The model's programs for batches of up to `batch` users; nothing is compiled yet.

    Raises:
        Unsupported: JAX or the device is missing.
    """
    from nann.engine.scoring.pjrt_client import PjrtDevice

    on_gpu = device.kind == "cuda"
    rows = max_rows or (_GPU_MAX_ROWS if on_gpu else _CPU_MAX_ROWS)
    tile = tile_rows or (_GPU_TILE_ROWS if on_gpu else _CPU_TILE_ROWS)
    grid = BucketGrid(
        max_batch=batch,
        max_rows=rows,
        tile_rows=tile,
        wide=False,
        crossed_rows=max(1, rows // batch // tile) * tile,
    )
    if on_gpu:
        pjrt = PjrtDevice.cuda(device.index, options={}, memory_fraction=_XLA_MEMORY_SHARE)
    else:
        pjrt = PjrtDevice.cpu(
            threads=threads_per_lane(lanes), options={"xla_cpu_experimental_ynn_fusion_type": ""}
        )
    functions = ModelFunctions(precision)
    return PjrtPrograms.from_functions(
        pjrt,
        encode_user=functions.encode_user,
        score=functions.score,
        weights=functions.weights(weights, embeddings),
        interface=Interface(
            user_tensors=functions.user_tensors,
            item_tensors=functions.item_tensors,
            num_items=len(embeddings),
            history_length=HISTORY_LENGTH,
            comm_seq_width=None,
        ),
        grid=grid,
    )


def compile_all(programs: PjrtPrograms) -> None:
    """Compile every program, on as many threads as there are processors."""
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda key: programs.compile(*key), programs.all_programs()):
            pass


def open_bench(
    device: Device,
    world: World,
    programs: PjrtPrograms,
    *,
    lanes: int,
) -> Bench:
    """An engine of so many lanes over the programs; not warmed up yet.

    Raises:
        BackendError: something does not fit into the device's memory; says what.
    """
    artifact: Any = world  # has the fields that the engine reads, and no directory
    history, batch = world.corpus.history, programs.grid.max_batch
    if device.kind == "cpu":
        opened = cpu_lanes(
            artifact,
            [PjrtScorer(programs, HostHandover(programs.device)) for _ in range(lanes)],
            max_batch=batch,
        )
        engine = SearchEngine(artifact, opened, max_batch=batch, max_k=_MAX_K)
        return Bench(engine, history, batch, lambda: None, lambda: 0, lambda: 0)
    from nann.engine.cuda.handover import JaxHandover
    from nann.engine.gpu_lanes import lanes_of

    opened = lanes_of(
        artifact,
        device.index,
        programs.grid,
        lambda _lane, stream: PjrtScorer(programs, JaxHandover(stream)),
        lanes=lanes,
        memory=DeviceMemory(xla_fraction=_XLA_MEMORY_SHARE),
    )
    backends: list[Any] = [backend for backend, _ in opened]
    return Bench(
        SearchEngine(artifact, opened, max_batch=batch, max_k=_MAX_K),
        history,
        batch,
        backends[0].stream.synchronize,
        lambda: sum(backend.launches for backend in backends),
        lambda: sum(backend.n_growths for backend in backends),
    )
