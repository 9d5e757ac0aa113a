"""The lanes of GPUs: tables once a device, and for each lane a backend and its way to the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from nann.engine.errors import Unsupported
from nann.engine.scoring.buckets import BucketGrid

if TYPE_CHECKING:
    from nann.engine.artifacts import Artifact
    from nann.engine.backend import Backend
    from nann.engine.devices import DeviceMemory, Precision
    from nann.engine.scoring.scorer import Scorer

__all__ = ["gpu_lanes", "lanes_of"]

# What one GPU's lanes score with: the shapes, and the scorer of a lane by its number there and its stream.
Scorers: TypeAlias = tuple[BucketGrid, Callable[[int, Any], "Scorer"]]

# Left free for XLA's intermediate values at load, where its share allows so much: in the largest shape that
# is published by default, 131,072 rows, a thousand float32 a row are 0.5 GiB, and a few such values live at
# a time. Arithmetic, not a measurement.
_XLA_RESERVE_BYTES = 2 << 30
# The shapes for a GPU where no exported programs prescribe any: those that `nann export` writes by default.
_MAX_ROWS, _TILE_ROWS = 131072, 64


def gpu_lanes(
    artifact: Artifact,
    gpus: Sequence[int],
    *,
    scorer: Literal["tensorflow", "pjrt"],
    lanes: int,
    max_batch: int,
    memory: DeviceMemory,
    xla_cache_dir: Path | None = None,
    kernel_cache_dir: Path | None = None,
    precision: Precision = "float32",
) -> list[tuple[Backend[Any, Any], Scorer]]:
    """`lanes` lanes on each of the GPUs, GPU by GPU; nothing is compiled yet.

    Raises:
        Unsupported: the scorer cannot run there, or the kernel cache cannot be written.
        BackendError: something does not fit into a GPU's memory; names it, and how much is needed.
    """
    if kernel_cache_dir is not None:
        _keep_kernels_in(kernel_cache_dir)
    if scorer == "pjrt":
        scorers = _pjrt(
            artifact,
            gpus,
            max_batch=max_batch,
            memory=memory,
            cache_dir=xla_cache_dir,
            precision=precision,
        )
    else:
        scorers = _tensorflow(
            artifact, gpus, lanes=lanes, max_batch=max_batch, memory=memory, cache_dir=xla_cache_dir
        )
    opened: list[tuple[Backend[Any, Any], Scorer]] = []
    for gpu, (grid, scorer_of) in zip(gpus, scorers, strict=True):
        opened += lanes_of(artifact, gpu, grid, scorer_of, lanes=lanes, memory=memory)
    return opened


def lanes_of(
    artifact: Artifact,
    gpu: int,
    grid: BucketGrid,
    scorer_of: Callable[[int, Any], Scorer],
    *,
    lanes: int,
    memory: DeviceMemory,
) -> list[tuple[Backend[Any, Any], Scorer]]:
    from nann.engine.cuda.backend import CudaBackend
    from nann.engine.cuda.errors import device_errors
    from nann.engine.cuda.inventory import bound_memory, cuda_devices
    from nann.engine.cuda.lane_memory import LaneLimits
    from nann.engine.cuda.tables import DeviceTables

    total_bytes = cuda_devices()[gpu].memory_bytes
    limit_bytes = memory.limit_bytes(total_bytes)
    bound_memory(gpu, limit_bytes)
    limits = LaneLimits()
    gate_queries = None if artifact.gate is None else artifact.gate.queries
    tables = DeviceTables.load(
        neighbors=artifact.neighbors,
        item_state=artifact.item_state,
        item_vectors=artifact.item_vectors,
        gate_queries=gate_queries,
        device=gpu,
        padding_rows=grid.crossed_rows or 0,
        lane_bytes=limits.plan(
            grid,
            artifact.num_items,
            artifact.item_state,
            scans=artifact.item_vectors is not None,
            gated=gate_queries is not None,
        ),
        lanes=lanes,
        reserve_bytes=min(_XLA_RESERVE_BYTES, int(memory.xla_fraction * total_bytes)),
        limit_bytes=limit_bytes,
    )
    opened: list[tuple[Backend[Any, Any], Scorer]] = []
    for lane in range(lanes):
        backend = CudaBackend(tables, grid=grid, limits=limits)
        with device_errors(f"opening lane {lane} on cuda:{gpu}"):
            backend.stream.synchronize()  # so that what fails does so here, and nothing is under way
        opened.append((backend, scorer_of(lane, backend.stream)))
    return opened


def _pjrt(
    artifact: Artifact,
    gpus: Sequence[int],
    *,
    max_batch: int,
    memory: DeviceMemory,
    cache_dir: Path | None,
    precision: Precision,
) -> list[Scorers]:
    """The version's own programs, shared by the lanes of a GPU; what lanes lend is ordered by events."""
    from nann.engine.cuda.handover import JaxHandover
    from nann.engine.scoring.pjrt_programs import open_programs
    from nann.engine.scoring.pjrt_scorer import PjrtScorer

    def of_gpu(gpu: int) -> Scorers:
        programs = open_programs(
            artifact.directory,
            artifact.manifest,
            platform="cuda",
            device_index=gpu,
            max_batch=max_batch,
            cache_dir=cache_dir,
            memory_fraction=memory.xla_fraction,
            half_products=None if precision == "float32" else precision,
        )
        return programs.grid, lambda _lane, stream: PjrtScorer(programs, JaxHandover(stream))

    return [of_gpu(gpu) for gpu in gpus]


def _tensorflow(
    artifact: Artifact,
    gpus: Sequence[int],
    *,
    lanes: int,
    max_batch: int,
    memory: DeviceMemory,
    cache_dir: Path | None,
) -> list[Scorers]:
    """The SavedModel on a logical device of TensorFlow a lane, each with its copy of the weights."""
    from nann.engine.cuda.handover import TensorFlowHandover
    from nann.engine.cuda.inventory import cuda_devices
    from nann.engine.scoring.tensorflow_memory import GpuMemory, split_gpus
    from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer, configure_tensorflow

    tf = configure_tensorflow(xla_cache_dir=cache_dir, intra_op_threads=None)
    smallest_bytes = min(cuda_devices()[gpu].memory_bytes for gpu in gpus)
    divided = split_gpus(tf, gpus, lanes=lanes, memory_limit_bytes=int(memory.xla_fraction * smallest_bytes))
    grid = BucketGrid(max_batch=max_batch, max_rows=_MAX_ROWS, tile_rows=_TILE_ROWS, wide=False)

    def of_gpu(logical: list[int]) -> Scorers:
        def of_lane(lane: int, stream: Any) -> Scorer:
            handover = TensorFlowHandover(stream, logical=logical[lane])
            return TensorFlowScorer(
                artifact.directory,
                artifact.manifest,
                max_batch=max_batch,
                xla_cache_dir=cache_dir,
                grid=grid,
                memory=GpuMemory(tf, handover, device=f"GPU:{logical[lane]}"),
            )

        return grid, of_lane

    return [of_gpu(logical) for logical in divided]


def _keep_kernels_in(directory: Path) -> None:
    """CuPy asks for the directory at each compilation, and fails where it cannot write."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unsupported(
            f"no kernel cache in {directory}: {error.strerror}; set --kernel-cache-dir"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Unsupported(f"no kernel cache in {directory}: it is not writable; set --kernel-cache-dir")
    os.environ["CUPY_CACHE_DIR"] = str(directory)
