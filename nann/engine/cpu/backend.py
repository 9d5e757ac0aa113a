"""The search primitives on the CPU: NumPy arrays and the loops of `kernels`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.backend import Admission, Tiles
from nann.engine.cpu import kernels
from nann.engine.cpu.gate_kernels import expand_gated
from nann.engine.cpu.largest_product import LANES
from nann.engine.errors import Unsupported
from nann.engine.gate import GateBatch

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.engine.gate import Gate
    from nann.engine.scoring.buckets import BucketGrid

__all__ = ["CpuBackend", "CpuBeam", "CpuCandidates"]

_ALL_ALLOWED = np.empty(0, dtype=np.bool_)
_NOTHING = np.empty(0, dtype=np.int32)
_NO_SCORES = np.empty(0, dtype=np.float32)
_ALIGNMENT_BYTES = 64  # XLA takes a buffer without copying it only when it is aligned to a cache line


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(n_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[offset : offset + n_bytes].view(dtype).reshape(shape)


def _as_words(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The rows of each table as words, [rows, words]: the widest word that fits the rows of all."""
    flat = [table.reshape(table.shape[0], math.prod(table.shape[1:])) for table in tables]
    word_bytes = math.gcd(8, *(rows.shape[1] * rows.itemsize for rows in flat))
    return tuple(rows.view(f"u{word_bytes}") for rows in flat)


class _Pool:
    """Sorted keys of the best nodes of each query, and which of them were expanded."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.keys = np.empty((batch, capacity), dtype=np.uint64)
        self.expanded = np.empty((batch, capacity), dtype=np.uint8)
        self.size = np.zeros(batch, dtype=np.int32)


class CpuBeam:
    """One batch's memory: views into the lane's scratch, valid until the lane's next `begin`."""

    def __init__(
        self,
        batch: int,
        visited: np.ndarray,
        admissions: Sequence[Admission | None],
        gates: GateBatch | None,
    ) -> None:
        self.batch = batch
        self.gates = gates
        self.estimated = np.zeros(batch, dtype=np.int64)
        self.visited = visited
        self.admissions = admissions
        self.pool = _Pool(batch, 0)
        self.answer: _Pool | None = _Pool(batch, 0) if any(a is not None for a in admissions) else None
        self.frontier = np.empty((batch, 0), dtype=np.int32)
        self.frontier_score = np.empty((batch, 0), dtype=np.float32)
        self.frontier_count = np.zeros(batch, dtype=np.int32)
        self.nonfinite = np.zeros(batch, dtype=np.int64)
        self.steps: list[np.ndarray] = []
        if self.answer is not None:
            barred = [_NOTHING if a is None else a.excluded for a in admissions]
            self.excluded = np.concatenate(barred)
            self.excluded_splits = np.zeros(batch + 1, dtype=np.int32)
            np.cumsum([items.size for items in barred], out=self.excluded_splits[1:])
            self.masks = [
                (b, a.mask) for b, a in enumerate(admissions) if a is not None and a.mask is not None
            ]

    @property
    def scored_per_step(self) -> Int32[np.ndarray, "steps batch"]:
        return np.array(self.steps, dtype=np.int32).reshape(-1, self.batch)


@dataclass(slots=True)
class CpuCandidates:
    """Items to be scored, ragged by query: ``item_index[row_splits[b] : row_splits[b + 1]]`` are query
    b's, and ``scores`` lie beside them once the scorer's answers were taken."""

    item_index: Int32[np.ndarray, " total"]
    row_splits: Int32[np.ndarray, " batch+1"]
    scores: Float32[np.ndarray, " total"] | None = None


class CpuBackend:
    """One lane's scratch over shared tables: ``neighbors[level]`` and the item tensors, [N, …] each.

    `item_vectors` are for `nearest` alone and read where they lie, so they may be a mapped file.
    `gate_queries` are the candidates' side of a gate; without them no query has one.
    """

    def __init__(
        self,
        *,
        num_items: int,
        neighbors: Sequence[Int32[np.ndarray, "N degree"]],
        item_state: Mapping[str, np.ndarray],
        max_batch: int,
        max_pairs: int,
        item_vectors: Float32[np.ndarray, "N dim"] | None = None,
        gate_queries: Float32[np.ndarray, "N columns"] | None = None,
    ) -> None:
        self._num_items = num_items
        self._gate_queries = gate_queries
        self._item_vectors = item_vectors
        self._neighbors = tuple(neighbors)
        self._tables = _as_words(list(item_state.values()))
        self._tiles = {
            name: _aligned((max_pairs, *table.shape[1:]), table.dtype) for name, table in item_state.items()
        }
        self._tile_words = _as_words(list(self._tiles.values()))
        self._tile_query = _aligned((max_pairs,), np.dtype(np.int32))
        self._visited = np.zeros((max_batch, -(-num_items // 64)), dtype=np.uint64)
        self._new_keys = np.empty(0, dtype=np.uint64)
        self._old_keys = np.empty(0, dtype=np.uint64)
        self._old_expanded = np.empty(0, dtype=np.uint8)

    @property
    def launches(self) -> int:
        return 0

    def begin(
        self,
        batch: int,
        *,
        with_answer: Sequence[Admission | None],
        gates: Sequence[Gate | None] | None = None,
    ) -> CpuBeam:
        gated = None
        if gates is not None and any(gate is not None for gate in gates):
            if self._gate_queries is None:
                raise Unsupported("this version carries no tables for a gate")
            gated = GateBatch(gates, lanes=LANES)
        visited = self._visited[:batch]
        visited.fill(0)
        return CpuBeam(batch, visited, with_answer, gated)

    def seed(self, beam: CpuBeam, rows: Sequence[Int32[np.ndarray, " n"]]) -> CpuCandidates:
        listed = self.listed(beam, rows)
        out = np.empty(listed.item_index.size, dtype=np.int32)
        out_splits = np.empty_like(listed.row_splits)
        kernels.seed(beam.visited, listed.item_index, listed.row_splits, out, out_splits)
        return self._step(beam, out, out_splits)

    def listed(self, beam: CpuBeam, rows: Sequence[Int32[np.ndarray, " n"] | range]) -> CpuCandidates:
        splits = np.zeros(beam.batch + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=splits[1:])
        flat = [np.arange(r.start, r.stop, dtype=np.int32) if isinstance(r, range) else r for r in rows]
        return CpuCandidates(np.concatenate(flat), splits)

    def nearest(self, beam: CpuBeam, vectors: Float32[np.ndarray, "batch dim"], count: int) -> CpuCandidates:
        if self._item_vectors is None:
            raise Unsupported("this version carries no item vectors to scan")
        count = min(count, self._num_items)
        products = np.empty(self._num_items, dtype=np.float32)
        rows = []
        for vector in vectors:
            kernels.unit_inner_products(self._item_vectors, vector, products)
            least = np.partition(products, self._num_items - count)[self._num_items - count]
            above = np.flatnonzero(products > least)
            tied = np.flatnonzero(products == least)[: count - above.size]
            rows.append(np.concatenate([above, tied]).astype(np.int32))
        return self.seed(beam, rows)

    def expand(self, beam: CpuBeam, level: int, *, admit: int = 0) -> CpuCandidates | None:
        if not beam.frontier_count.any():
            return None
        table, gates = self._neighbors[level], beam.gates
        out = np.empty(int(beam.frontier_count.sum()) * table.shape[1], dtype=np.int32)
        out_splits = np.empty(beam.batch + 1, dtype=np.int32)
        if gates is None or not admit:
            kernels.expand(beam.visited, table, beam.frontier, beam.frontier_count, out, out_splits)
            return self._step(beam, out, out_splits)
        most = int(beam.frontier_count.max()) * table.shape[1]
        if self._new_keys.size < most:
            self._new_keys = np.empty(most, dtype=np.uint64)
        expand_gated(
            beam.visited,
            table,
            beam.frontier,
            beam.frontier_score,
            beam.frontier_count,
            beam.pool.keys,
            beam.pool.size,
            self._gate_queries,
            gates.bias,
            gates.keys,
            gates.context,
            gates.known,
            gates.rank,
            gates.margin,
            gates.residual_weight,
            admit,
            self._new_keys,
            beam.estimated,
            out,
            out_splits,
        )
        return self._step(beam, out, out_splits)

    def gather(self, candidates: CpuCandidates, grid: BucketGrid) -> Iterator[Tiles]:
        for plan in grid.plan(candidates.row_splits.tolist()):
            tiles, rows = plan.shape.tiles, plan.shape.rows
            segments = np.array([(s.query, s.start, s.stop, s.row) for s in plan.segments], dtype=np.int32)
            tile_query = self._tile_query[:tiles]
            kernels.gather_rows(
                self._tables,
                candidates.item_index,
                segments,
                rows,
                plan.shape.pairs,
                self._tile_words,
                tile_query,
            )
            items = {
                name: buffer[: tiles * rows].reshape(tiles, rows, *buffer.shape[1:])
                for name, buffer in self._tiles.items()
            }
            yield Tiles(plan.shape, tile_query, items, plan.segments)

    def take_scores(
        self, candidates: CpuCandidates, tiles: Tiles, scores: Float32[np.ndarray, "tiles rows"]
    ) -> None:
        flat = scores.reshape(-1)
        total = candidates.item_index.size
        segments = tiles.place
        if len(segments) == 1 and segments[0].stop - segments[0].start == total:
            candidates.scores = flat[:total]  # one query alone in one call: nothing to put together
            return
        if candidates.scores is None:
            candidates.scores = np.empty(total, dtype=np.float32)
        for segment in segments:
            count = segment.stop - segment.start
            candidates.scores[segment.start : segment.stop] = flat[segment.row : segment.row + count]

    def merge_beam(
        self,
        beam: CpuBeam,
        candidates: CpuCandidates,
        *,
        keep: int,
        capacity: int,
        width: int,
        forget: bool,
    ) -> None:
        self._merge(beam.pool, beam, candidates, _ALL_ALLOWED, keep, capacity, beam.nonfinite)
        if beam.answer is not None:
            uncounted = np.zeros(beam.batch, dtype=np.int64)
            allowed = self._allowed(beam, candidates)
            self._merge(beam.answer, beam, candidates, allowed, keep, capacity, uncounted)
        beam.frontier = np.empty((beam.batch, width), dtype=np.int32)
        beam.frontier_score = np.empty((beam.batch, width), dtype=np.float32)
        pool = beam.pool
        kernels.advance(
            beam.visited,
            pool.keys,
            pool.expanded,
            pool.size,
            forget,
            width,
            beam.frontier,
            beam.frontier_score,
            beam.frontier_count,
        )

    def unvisited(self, beam: CpuBeam, query: int) -> Int32[np.ndarray, " n"]:
        words = np.ascontiguousarray(beam.visited[query]).view(np.uint8)
        visited = np.unpackbits(words, bitorder="little", count=self._num_items)
        return np.flatnonzero(visited == 0).astype(np.int32)

    def to_host(
        self, beam: CpuBeam, k: Sequence[int]
    ) -> list[tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]]:
        answers = []
        for b in range(beam.batch):
            filtered = beam.answer is not None and beam.admissions[b] is not None
            pool = beam.answer if filtered and beam.answer is not None else beam.pool
            keys = pool.keys[b, : int(pool.size[b])]
            if filtered:  # `level` may score an item on two levels of the graph, with one key both times
                keys = np.unique(keys)
            answers.append(kernels.unpack(keys[: k[b]]))
        return answers

    @staticmethod
    def _step(beam: CpuBeam, items: np.ndarray, row_splits: np.ndarray) -> CpuCandidates:
        beam.steps.append(np.diff(row_splits))
        return CpuCandidates(items[: row_splits[-1]], row_splits)

    def _allowed(self, beam: CpuBeam, candidates: CpuCandidates) -> np.ndarray:
        """Which candidates their query may return."""
        allowed = np.empty(candidates.item_index.size, dtype=np.bool_)
        kernels.admit(
            candidates.item_index, candidates.row_splits, beam.excluded, beam.excluded_splits, allowed
        )
        for b, mask in beam.masks:
            rows = slice(candidates.row_splits[b], candidates.row_splits[b + 1])
            allowed[rows] &= mask[candidates.item_index[rows]]
        return allowed

    def _merge(
        self,
        pool: _Pool,
        beam: CpuBeam,
        candidates: CpuCandidates,
        allowed: np.ndarray,
        keep: int,
        capacity: int,
        nonfinite: np.ndarray,
    ) -> None:
        scores = _NO_SCORES if candidates.scores is None else candidates.scores
        if pool.keys.shape[1] < capacity:  # `level` lets the pool grow from stage to stage
            grown = _Pool(beam.batch, capacity)
            held = pool.keys.shape[1]
            grown.keys[:, :held] = pool.keys
            grown.expanded[:, :held] = pool.expanded
            pool.keys, pool.expanded = grown.keys, grown.expanded
        if self._new_keys.size < scores.size:
            self._new_keys = np.empty(scores.size, dtype=np.uint64)
        if self._old_keys.size < capacity:
            self._old_keys = np.empty(capacity, dtype=np.uint64)
            self._old_expanded = np.empty(capacity, dtype=np.uint8)
        kernels.merge(
            pool.keys,
            pool.expanded,
            pool.size,
            candidates.item_index,
            candidates.row_splits,
            scores,
            allowed,
            keep,
            capacity,
            nonfinite,
            self._new_keys,
            self._old_keys,
            self._old_expanded,
        )
