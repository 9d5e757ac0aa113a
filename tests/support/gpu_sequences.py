"""Random sequences of the primitives of a search, run on any backend: what came of each, to be compared.

Needs NumPy alone, so that it also runs where nothing else is installed. Scores are small integers with many
ties, and some that are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nann.engine.backend import Admission
from nann.engine.gate import Gate
from nann.engine.scoring.buckets import BucketGrid

__all__ = ["Case", "cpu_lane", "cuda_lane", "run_sequence"]

NO_LIMIT = 2**31 - 1
_GATE_DIM, _GATE_CONTEXT_DIM = 16, 8
_ODD_SCORES = (np.nan, np.inf, -np.inf, -0.0, 1e-45)


@dataclass(frozen=True)
class Case:
    """Tables and scores of one corpus, and the shapes that a lane over it is made for."""

    neighbors: Sequence[np.ndarray]
    item_state: dict[str, np.ndarray]
    item_vectors: np.ndarray
    gate_queries: np.ndarray
    scores: np.ndarray
    grid: BucketGrid

    @classmethod
    def random(
        cls, seed: int, *, num_items: int, degree: int, batch: int, max_rows: int, tile_rows: int = 32
    ) -> Case:
        """A graph of rows of random length, and scores by (query, item)."""
        rng = np.random.default_rng(seed)
        tables = []
        for width in (degree, max(1, degree // 2)):
            table = rng.integers(0, num_items, (num_items, width)).astype(np.int32)
            table[np.arange(width) >= rng.integers(0, width + 1, num_items)[:, None]] = -1
            tables.append(table)
        scores = rng.integers(-9, 10, (batch, num_items)).astype(np.float32)
        odd = rng.random(scores.shape) < 0.02
        scores[odd] = rng.choice(_ODD_SCORES, int(odd.sum()))
        return cls(
            tables,
            {
                "odd": rng.normal(size=(num_items, 3)).astype(np.float16),
                "number": np.arange(1, num_items + 1, dtype=np.float32),
                "wide": rng.normal(size=(num_items, 128)).astype(np.float16),
            },
            rng.integers(-2, 3, (num_items, 8)).astype(np.float32) * 0.5,
            rng.normal(size=(num_items, 1 + _GATE_DIM + _GATE_CONTEXT_DIM)).astype(np.float16),
            scores,
            BucketGrid(max_batch=batch, max_rows=max_rows, tile_rows=tile_rows, wide=False, crossed_rows=64),
        )

    @property
    def num_items(self) -> int:
        return self.scores.shape[1]


class CpuArrays:
    """Moves nothing: the CPU backend's arrays are the host's."""

    def to_host(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def to_device(self, array: np.ndarray) -> Any:
        return array


class CudaArrays:
    """Moves arrays on a lane's stream, and keeps what it gave: scores are read later than they are taken."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._given: list[Any] = []

    def to_host(self, array: Any) -> np.ndarray:
        found: np.ndarray = array.get(stream=self._stream)
        self._stream.synchronize()
        return found

    def to_device(self, array: np.ndarray) -> Any:
        import cupy

        with self._stream:
            on_device = cupy.empty(array.shape, dtype=array.dtype)
            on_device.set(np.ascontiguousarray(array), stream=self._stream)
        self._stream.synchronize()
        self._given = [*self._given[-64:], on_device]
        return on_device


def cpu_lane(case: Case) -> tuple[Any, CpuArrays]:
    """The CPU backend over the case, and its way to arrays."""
    from nann.engine.cpu.backend import CpuBackend

    backend = CpuBackend(
        num_items=case.num_items,
        neighbors=case.neighbors,
        item_state=case.item_state,
        max_batch=case.grid.max_batch,
        max_pairs=case.grid.max_rows,
        item_vectors=case.item_vectors,
        gate_queries=case.gate_queries.astype(np.float32),
    )
    return backend, CpuArrays()


def cuda_lane(case: Case, *, sizes: Any = None, limits: Any = None) -> tuple[Any, CudaArrays]:
    """A CUDA lane over the case, with tables of its own."""
    from nann.engine.cuda.backend import CudaBackend
    from nann.engine.cuda.tables import DeviceTables

    tables = DeviceTables.load(
        neighbors=case.neighbors,
        item_state=case.item_state,
        item_vectors=case.item_vectors,
        gate_queries=case.gate_queries,
        padding_rows=case.grid.crossed_rows or 0,
        sizes=sizes,
    )
    backend = CudaBackend(tables, grid=case.grid, limits=limits)
    return backend, CudaArrays(backend.stream)


def run_sequence(case: Case, backend: Any, arrays: Any, seed: int, *, steps: int = 4) -> list[Any]:
    """One search of random primitives drawn from `seed`: everything that can be seen of it, in order.

    Candidates come in any order, so they are seen as sorted lists.
    """
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, case.grid.max_batch + 1))
    admissions = [_admission(rng, case.num_items) for _ in range(batch)]
    gates = [_gate(rng) for _ in range(batch)]
    beam = backend.begin(batch, with_answer=admissions, gates=gates)
    seen: list[Any] = []
    kind = rng.choice(["walk", "walk", "nearest", "scan"])
    if kind == "scan":  # a range that all queries share, in chunks
        step = int(rng.integers(50, 400))
        for start in range(0, case.num_items, step):
            chunk = range(start, min(start + step, case.num_items))
            listed = backend.listed(beam, [chunk] * batch)
            seen.append(_score(case, backend, arrays, listed, batch, within=chunk))
            backend.merge_beam(beam, listed, keep=NO_LIMIT, capacity=700, width=0, forget=False)
    else:
        seen += _walk(case, backend, arrays, beam, rng, by_vector=kind == "nearest", steps=steps)
        if rng.random() < 0.3:  # what the walk did not reach
            rest = [backend.unvisited(beam, query)[:300] for query in range(batch)]
            listed = backend.listed(beam, rest)
            seen.append(_score(case, backend, arrays, listed, batch))
            backend.merge_beam(beam, listed, keep=NO_LIMIT, capacity=700, width=0, forget=False)
    found = backend.to_host(beam, [int(k) for k in rng.integers(0, 800, batch)])
    seen.append([(items.tolist(), scores.tolist()) for items, scores in found])
    seen.append(beam.scored_per_step.tolist())
    seen.append(beam.nonfinite.tolist())
    seen.append(beam.estimated.tolist())
    seen.append([backend.unvisited(beam, query).tolist() for query in range(batch)])
    return seen


def _walk(
    case: Case, backend: Any, arrays: Any, beam: Any, rng: np.random.Generator, *, by_vector: bool, steps: int
) -> list[Any]:
    batch = beam.batch
    if by_vector:
        vectors = rng.integers(-2, 3, (batch, case.item_vectors.shape[1])).astype(np.float32)
        candidates = backend.nearest(beam, vectors, int(rng.integers(1, 50)))
    else:
        rows = [rng.integers(0, case.num_items, rng.integers(0, 60)).astype(np.int32) for _ in range(batch)]
        candidates = backend.seed(beam, rows)
    seen = []
    for _ in range(int(rng.integers(1, steps + 1))):
        seen.append(_score(case, backend, arrays, candidates, batch))
        backend.merge_beam(
            beam,
            candidates,
            keep=int(rng.choice([1, 16, 300, NO_LIMIT])),
            capacity=int(rng.choice([3, 40, 700])),
            width=int(rng.choice([1, 5, 64])),
            forget=bool(rng.random() < 0.2),
        )
        level, admit = int(rng.integers(0, 2)), int(rng.choice([0, 1, 20, 300]))
        following = backend.expand(beam, level, admit=admit)
        if following is None:
            break
        candidates = following
    return seen


def _score(
    case: Case, backend: Any, arrays: Any, candidates: Any, batch: int, *, within: range | None = None
) -> list[list[int]]:
    """Take the case's scores as the model's, NaN for padding; the candidates of each query, ascending.

    A tile for every query may hold items past the last candidate, outside the range `within` listed.
    """
    found: list[list[int]] = [[] for _ in range(batch)]
    tables = case.item_state
    for tiles in backend.gather(candidates, case.grid):
        items = {name: arrays.to_host(tensor) for name, tensor in tiles.items.items()}
        number = items["number"].astype(np.int64) - 1
        for name, table in tables.items():  # what was copied is what the tables hold
            there = number >= 0
            np.testing.assert_array_equal(items[name][there], table[number[there]])
            assert not items[name][~there].any()
        if within is not None:
            number = np.where((number >= within.start) & (number < within.stop), number, -1)
        if tiles.tile_query is None:
            queries = np.arange(case.grid.max_batch)[:, None]
            number = np.broadcast_to(number, (case.grid.max_batch, number.shape[1]))
        else:
            queries = arrays.to_host(tiles.tile_query)[:, None]
        scores = np.where(number >= 0, case.scores[queries, number], np.nan).astype(np.float32)
        for query, row in zip(np.broadcast_to(queries, number.shape), number, strict=True):
            if query[0] < batch:
                found[query[0]] += row[row >= 0].tolist()
        backend.take_scores(candidates, tiles, arrays.to_device(scores))
    return [sorted(items) for items in found]


def _admission(rng: np.random.Generator, num_items: int) -> Admission | None:
    if rng.random() < 0.5:
        return None
    mask = None if rng.random() < 0.5 else rng.random(num_items) < 0.6
    excluded = np.unique(rng.integers(0, num_items, rng.integers(0, 30))).astype(np.int32)
    allowed = np.ones(num_items, np.bool_) if mask is None else mask.copy()
    allowed[excluded] = False
    return Admission(mask, excluded, int(allowed.sum()))


def _gate(rng: np.random.Generator) -> Gate | None:
    if rng.random() < 0.3:
        return None
    known = int(rng.integers(1, 60))
    return Gate(
        bias=rng.normal(size=known).astype(np.float32),
        keys=rng.normal(size=(known, _GATE_DIM)).astype(np.float32),
        context=rng.normal(size=_GATE_CONTEXT_DIM).astype(np.float32),
        rank=int(rng.choice([1, 20, 300])),
        margin=float(rng.uniform(0, 10)),
        residual_weight=0.75,
    )
