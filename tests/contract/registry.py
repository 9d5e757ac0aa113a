"""Everything that claims to be a Backend, a Retriever or a Scorer: one line each covers a newcomer."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cuda_kernels import SMALL
from cuda_shim.fixtures import installed
from engine_world import HISTORY_LENGTH, IntegerScorer, make_world
from tiny_models import TinyModel, attention, publish, publish_programs, real_model

from nann.engine.backend import Backend, Tiles
from nann.engine.cpu.backend import CpuBackend
from nann.engine.retrievers.exhaustive import ExhaustiveRetriever
from nann.engine.retrievers.hnsw import HnswRetriever
from nann.engine.retrievers.inner_product import InnerProductRetriever
from nann.engine.retrievers.retriever import Retriever
from nann.engine.scoring.buckets import MAX_ROWS, BucketGrid
from nann.engine.scoring.pjrt_programs import open_programs
from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer
from nann.engine.scoring.scorer import Scorer
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

__all__ = ["BACKENDS", "MAX_BATCH", "RETRIEVERS", "SCORERS", "AdaptedScorer", "BackendCase", "ScorerCase"]

MAX_BATCH = 4


@dataclass(frozen=True)
class BackendCase:
    """A kind of backend, and how tests look at what it keeps to itself.

    ``make(num_items=, neighbors=, item_state=, max_batch=, max_pairs=)`` is one lane; `rows_of` and
    `frontier_of` give item indices by query, `to_host` and `to_device` move arrays. All within `around`.
    """

    make: Callable[..., Backend[Any, Any]]
    grid: Callable[..., BucketGrid]
    rows_of: Callable[[Any], list[list[int]]]
    frontier_of: Callable[[Any], list[list[int]]]
    to_host: Callable[[Any], np.ndarray]
    to_device: Callable[[np.ndarray], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class AdaptedScorer:
    """A scorer of the CPU for a backend whose arrays may be elsewhere, in that backend's shapes."""

    def __init__(self, case: BackendCase, scorer: Scorer) -> None:
        self._case = case
        self._scorer = scorer
        grid = case.grid(max_batch=scorer.grid.max_batch, max_rows=scorer.grid.max_rows)
        self.grid = grid if set(grid.shapes()) <= set(scorer.grid.shapes()) else scorer.grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, users: Any, tiles: Tiles) -> Any:
        items = {name: self._case.to_host(tensor) for name, tensor in tiles.items.items()}
        on_host = Tiles(tiles.shape, self._case.to_host(tiles.tile_query), items)
        return self._case.to_device(self._scorer.score(users, on_host))


def _cpu_rows(candidates: Any) -> list[list[int]]:
    return [candidates.item_index[a:b].tolist() for a, b in pairwise(candidates.row_splits)]


def _cpu_frontier(beam: Any) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(beam.frontier, beam.frontier_count, strict=True)]


def _cuda_lane(
    *, max_batch: int, max_pairs: int, num_items: int, gate_queries: np.ndarray | None = None, **tables: Any
) -> Backend[Any, Any]:
    from nann.engine.cuda.backend import CudaBackend
    from nann.engine.cuda.lane_memory import LaneLimits
    from nann.engine.cuda.tables import DeviceTables

    # Blocks and scratch so small that many blocks run, and that buffers must grow.
    if gate_queries is not None:
        tables["gate_queries"] = gate_queries.astype(np.float16)  # as an artifact has them
    on_device = DeviceTables.load(**tables, sizes=SMALL)
    assert on_device.num_items == num_items
    limits = LaneLimits(capacity=8, width=2, candidates=16, gate_bytes=16)
    return CudaBackend(on_device, grid=_cuda_grid(max_batch=max_batch, max_rows=max_pairs), limits=limits)


def _cuda_grid(*, max_batch: int, max_rows: int) -> BucketGrid:
    return BucketGrid(max_batch=max_batch, max_rows=max_rows, wide=False)


def _from_device(source: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of the device (an array or an address) after everything that was enqueued."""
    import cupy

    cupy.cuda.Device().synchronize()
    address = int(source) if isinstance(source, np.uint64) else source.data.ptr
    out, stream = np.empty(shape, dtype), _side_stream(cupy)
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(out.ctypes.data, address, out.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
    stream.synchronize()
    return out


@functools.lru_cache(maxsize=1)
def _side_stream(cupy: Any) -> Any:
    """A stream beside the lanes', one for each stand-in for CuPy."""
    return cupy.cuda.Stream(non_blocking=True)


def _cuda_rows(candidates: Any) -> list[list[int]]:
    counts, where = candidates.counts.tolist(), candidates.where
    if candidates.common is not None or not sum(counts):
        return [list(candidates.common or []) for _ in counts]
    if isinstance(where.item_start, np.uint64) and not where.item_start:
        starts = [b * where.item_stride for b in range(len(counts))]
    else:
        starts = _from_device(where.item_start, (len(counts),), np.int64).tolist()
    flat = _from_device(where.items, (max(a + n for a, n in zip(starts, counts, strict=True)),), np.int32)
    return [flat[a : a + n].tolist() for a, n in zip(starts, counts, strict=True)]


def _cuda_frontier(beam: Any) -> list[list[int]]:
    if not beam.width:
        return [[] for _ in range(beam.batch)]
    nodes = _from_device(beam.frontier, (beam.batch, beam.width), np.int32)
    counts = _from_device(beam.frontier_count, (beam.batch,), np.int32)
    return [row[:n].tolist() for row, n in zip(nodes, counts, strict=True)]


# A lane reads scores later than it takes them, and waits once a step: whoever gives them keeps their memory
# until then.
_given: deque[Any] = deque(maxlen=64)


def _cuda_to_device(array: np.ndarray) -> Any:
    import cupy

    stream = _side_stream(cupy)
    with stream:
        on_device = cupy.empty(array.shape, array.dtype)
        on_device.set(np.ascontiguousarray(array), stream=stream)
    stream.synchronize()
    _given.append(on_device)
    return on_device


@contextmanager
def _cuda_on_the_shim() -> Iterator[None]:
    with installed(seed=1):
        yield
        _given.clear()
        _side_stream.cache_clear()


@dataclass(frozen=True)
class ScorerCase:
    """A scorer over a small corpus, and what the tests must know to feed it."""

    scorer: Scorer
    item_state: Mapping[str, np.ndarray]
    num_items: int
    history_length: int
    comm_seq: Callable[[np.ndarray], np.ndarray] | None


def _integer(directory: Path) -> ScorerCase:
    world = make_world(directory, num_items=90)
    scorer = IntegerScorer(world.item_vectors, max_batch=MAX_BATCH, max_rows=512)
    return ScorerCase(scorer, {"item_vector": world.item_vectors}, 90, HISTORY_LENGTH, None)


def _tensorflow(make: Callable[[int], TinyModel], max_rows: int) -> Callable[[Path], ScorerCase]:
    def build(directory: Path) -> ScorerCase:
        model = make(90)
        make_world(directory, num_items=model.num_items)
        manifest = publish(model, directory)
        grid = BucketGrid(max_batch=MAX_BATCH, max_rows=max_rows)
        scorer = TensorFlowScorer(directory, manifest, max_batch=MAX_BATCH, grid=grid)
        return ScorerCase(scorer, model.item_state(), model.num_items, model.history_length, model.comm_seq)

    return build


def _pjrt(make: Callable[[int], TinyModel], max_rows: int) -> Callable[[Path], ScorerCase]:
    def build(directory: Path) -> ScorerCase:
        model = make(90)
        make_world(directory, num_items=model.num_items)
        publish(model, directory)
        manifest = publish_programs(directory, max_batch=MAX_BATCH, max_rows=max_rows)
        programs = open_programs(directory, manifest, platform="cpu", max_batch=MAX_BATCH, intra_op_threads=2)
        scorer = PjrtScorer(programs, HostHandover(programs.device))
        return ScorerCase(scorer, model.item_state(), model.num_items, model.history_length, model.comm_seq)

    return build


def _real(name: str) -> Callable[[int], TinyModel]:
    return lambda num_items: real_model(name, num_items)


def _inner_product(backend: Backend[Any, Any], scorer: Scorer, *, num_items: int) -> Retriever:
    return InnerProductRetriever(backend, scorer, item_vectors=np.ones((num_items, 2), np.float32))


BACKENDS: dict[str, BackendCase] = {
    "cpu": BackendCase(CpuBackend, BucketGrid, _cpu_rows, _cpu_frontier, np.asarray, np.asarray),
    "cuda-shim": BackendCase(
        _cuda_lane,
        _cuda_grid,
        _cuda_rows,
        _cuda_frontier,
        lambda array: _from_device(array, array.shape, array.dtype),
        _cuda_to_device,
        _cuda_on_the_shim,
    ),
}
RETRIEVERS: dict[str, Callable[..., Retriever]] = {
    "hnsw": HnswRetriever,
    "exhaustive": ExhaustiveRetriever,
    "inner_product": _inner_product,
}
# The served model is checked at its real widths in every shape that serving compiles.
SCORERS: dict[str, Callable[[Path], ScorerCase]] = {
    "integer": _integer,
    "tensorflow-tiny-attention": _tensorflow(attention, 512),
    "tensorflow-attention_dnn": _tensorflow(_real("attention_dnn"), MAX_ROWS),
    "tensorflow-dnn": _tensorflow(_real("dnn"), 256),
    "tensorflow-two_sided": _tensorflow(_real("two_sided"), 256),
    "pjrt-tiny-attention": _pjrt(attention, 512),
    "pjrt-attention_dnn": _pjrt(_real("attention_dnn"), MAX_ROWS),
    "pjrt-dnn": _pjrt(_real("dnn"), 256),
    "pjrt-two_sided": _pjrt(_real("two_sided"), 256),
}
