"""A CUDA lane over a small random world on the stand-in for CuPy, and the CPU backend over the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_kernels import SMALL

from nann.engine.backend import Admission
from nann.engine.cpu.backend import CpuBackend
from nann.engine.cuda.modules import BlockSizes
from nann.engine.gate import Gate
from nann.engine.scoring.buckets import BucketGrid

__all__ = ["BATCH", "GRID", "CudaWorld", "random_admissions", "random_gates"]

BATCH = 4
GRID = BucketGrid(max_batch=BATCH, max_rows=512, wide=False)
NO_LIMIT = 2**31 - 1
GATE_DIM = 5


class CudaWorld:
    """Tables, one lane, and scores by (user, item) in place of a model. Needs the `fake_cupy` fixture."""

    def __init__(
        self,
        seed: int = 0,
        *,
        grid: BucketGrid = GRID,
        num_items: int = 150,
        limits: Any = None,
        gate_dim: int = GATE_DIM,
        sizes: BlockSizes = SMALL,
    ) -> None:
        from nann.engine.cuda.tables import DeviceTables

        self.rng = np.random.default_rng(seed)
        self.grid, self.num_items = grid, num_items
        self.neighbors = [self._table(degree) for degree in (8, 3)]
        self.item_state = {
            "wide": self.rng.normal(size=(num_items, 8)).astype(np.float16),
            "odd": self.rng.normal(size=(num_items, 3)).astype(np.float16),
            "number": np.arange(1, num_items + 1, dtype=np.float32),
        }
        self.item_vectors = self.rng.integers(-2, 3, (num_items, 5)).astype(np.float32)
        self.scores = self.rng.integers(-9, 9, (BATCH, num_items)).astype(np.float32)
        self.gate_queries = self.rng.normal(size=(num_items, 1 + gate_dim + 2)).astype(np.float16)
        self.tables = DeviceTables.load(
            neighbors=self.neighbors,
            item_state=self.item_state,
            item_vectors=self.item_vectors,
            gate_queries=self.gate_queries,
            padding_rows=grid.crossed_rows or 0,
            sizes=sizes,
        )
        self.lane = self.open_lane(limits)

    def _table(self, degree: int) -> np.ndarray:
        """Random neighbours, -1 at the end of rows, some of which are empty."""
        table = self.rng.integers(0, self.num_items, (self.num_items, degree)).astype(np.int32)
        table[np.arange(degree) >= self.rng.integers(0, degree + 1, self.num_items)[:, None]] = -1
        return table

    def open_lane(self, limits: Any = None) -> Any:
        """A further lane over the same tables."""
        from nann.engine.cuda.backend import CudaBackend
        from nann.engine.cuda.lane_memory import LaneLimits

        return CudaBackend(self.tables, grid=self.grid, limits=limits or LaneLimits(64, 16, 128))

    def cpu(self) -> CpuBackend:
        """The CPU backend over the same tables."""
        return CpuBackend(
            num_items=self.num_items,
            neighbors=self.neighbors,
            item_state=self.item_state,
            max_batch=BATCH,
            max_pairs=self.grid.max_rows,
            item_vectors=self.item_vectors,
            gate_queries=self.gate_queries.astype(np.float32),
        )

    def score(self, backend: Any, candidates: Any) -> int:
        """Score candidates as a scorer would, rows of padding by NaN; the number of calls that took."""
        calls = 0
        for tiles in backend.gather(candidates, self.grid):
            calls += 1
            number, tile_query = tiles.items["number"], tiles.tile_query
            if not isinstance(backend, CpuBackend):
                number = number.get(stream=backend.stream)
                tile_query = None if tile_query is None else tile_query.get(stream=backend.stream)
            users = np.arange(tiles.shape.tiles) if tile_query is None else tile_query
            rows = number.astype(np.int64) - 1
            scores = np.where(rows >= 0, self.scores[users[:, None], rows], np.nan).astype(np.float32)
            if not isinstance(backend, CpuBackend):
                scores = on_device(scores, backend.stream)
            backend.take_scores(candidates, tiles, scores)
        return calls

    def walk(
        self,
        backend: Any,
        admissions: Sequence[Admission | None],
        *,
        forgets: Sequence[int] = (),
        k: int = 10,
        gates: Sequence[Gate | None] | None = None,
        admit: int = 0,
        **stage: Any,
    ) -> list[Any]:
        """A beam search by its primitives: answers, scored items by step, what was counted, unvisited."""
        batch = len(admissions)
        stage = {"keep": NO_LIMIT, "capacity": 40, "width": 6, **stage}
        beam = backend.begin(batch, with_answer=admissions, gates=gates)
        candidates = backend.seed(beam, [np.arange(b, 60, 7, dtype=np.int32) for b in range(batch)])
        for step in range(5):
            self.score(backend, candidates)
            backend.merge_beam(beam, candidates, forget=step in forgets, **stage)
            candidates = backend.expand(beam, int(step == 0), admit=admit)
            if candidates is None:
                break
        answers = [
            (items.tolist(), scores.tolist())
            for items, scores in backend.to_host(beam, [k + b for b in range(batch)])
        ]
        unvisited = [backend.unvisited(beam, b).tolist() for b in range(batch)]
        counted = [beam.nonfinite.tolist(), beam.estimated.tolist()]
        return [answers, beam.scored_per_step.tolist(), counted, unvisited]


def on_device(array: np.ndarray, stream: Any) -> Any:
    """A copy whose memory goes back in the order of the stream that will read it."""
    import cupy

    with stream:
        copy = cupy.empty(array.shape, array.dtype)
    copy.set(array, stream=stream)
    return copy


def random_admissions(rng: np.random.Generator, batch: int, num_items: int = 150) -> list[Admission | None]:
    """Filters of every kind: a mask or none, some items excluded; every third query has none."""
    rules: list[Admission | None] = []
    for b in range(batch):
        mask = rng.random(num_items) < 0.5 if b % 2 else None
        excluded = np.unique(rng.integers(0, num_items, 12)).astype(np.int32)
        rules.append(None if b % 3 == 2 else Admission(mask, excluded, 1))
    return rules


def random_gates(rng: np.random.Generator, batch: int, dim: int = GATE_DIM) -> list[Gate | None]:
    """Gates of histories of every length; every third query has none."""
    gates: list[Gate | None] = []
    for b in range(batch):
        known = int(rng.integers(1, 20))
        gate = Gate(
            bias=rng.normal(size=known).astype(np.float32),
            keys=rng.normal(size=(known, dim)).astype(np.float32),
            context=rng.normal(size=2).astype(np.float32),
            rank=int(rng.integers(1, 15)),
            margin=float(rng.uniform(0, 3)),
            residual_weight=0.75,
        )
        gates.append(None if b % 3 == 2 else gate)
    return gates
