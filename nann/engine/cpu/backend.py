"""The search primitives on the CPU: NumPy arrays and the loops of `kernels`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.backend import Admission, Candidates, Frontier, Tiles
from nann.engine.cpu import kernels

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.engine.scoring.buckets import Plan

__all__ = ["CpuBackend", "CpuBeam"]

_ALL_ALLOWED = np.empty(0, dtype=np.bool_)
_NOTHING = np.empty(0, dtype=np.int32)
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

    def __init__(self, batch: int, visited: np.ndarray, admissions: Sequence[Admission | None]) -> None:
        self.batch = batch
        self.visited = visited
        self.admissions = admissions
        self.pool = _Pool(batch, 0)
        self.answer: _Pool | None = _Pool(batch, 0) if any(a is not None for a in admissions) else None
        self.nonfinite = np.zeros(batch, dtype=np.int64)
        if self.answer is not None:
            barred = [_NOTHING if a is None else a.excluded for a in admissions]
            self.excluded = np.concatenate(barred)
            self.excluded_splits = np.zeros(batch + 1, dtype=np.int32)
            np.cumsum([items.size for items in barred], out=self.excluded_splits[1:])
            self.masks = [
                (b, a.mask) for b, a in enumerate(admissions) if a is not None and a.mask is not None
            ]


class CpuBackend:
    """One lane's scratch over shared tables: ``neighbors[level]`` and the item tensors, [N, …] each."""

    def __init__(
        self,
        *,
        num_items: int,
        neighbors: Sequence[Int32[np.ndarray, "N degree"]],
        item_state: Mapping[str, np.ndarray],
        max_batch: int,
        max_pairs: int,
    ) -> None:
        self._num_items = num_items
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

    def begin(self, batch: int, *, with_answer: Sequence[Admission | None]) -> CpuBeam:
        visited = self._visited[:batch]
        visited.fill(0)
        return CpuBeam(batch, visited, with_answer)

    def seed(self, beam: CpuBeam, rows: Sequence[Int32[np.ndarray, " n"]]) -> Candidates:
        splits = np.zeros(beam.batch + 1, dtype=np.int32)
        np.cumsum([row.size for row in rows], out=splits[1:])
        flat = np.concatenate(rows) if rows else np.empty(0, np.int32)
        out = np.empty(splits[-1], dtype=np.int32)
        out_splits = np.empty_like(splits)
        kernels.seed(beam.visited, flat, splits, out, out_splits)
        return Candidates(out[: out_splits[-1]], out_splits)

    def expand(self, beam: CpuBeam, frontier: Frontier, level: int) -> Candidates:
        table = self._neighbors[level]
        out = np.empty(int(frontier.count.sum()) * table.shape[1], dtype=np.int32)
        out_splits = np.empty(beam.batch + 1, dtype=np.int32)
        kernels.expand(beam.visited, table, frontier.item_index, frontier.count, out, out_splits)
        return Candidates(out[: out_splits[-1]], out_splits)

    def gather(self, candidates: Candidates, plan: Plan) -> Tiles:
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
        return Tiles(
            tile_query,
            {
                name: buffer[: tiles * rows].reshape(tiles, rows, *buffer.shape[1:])
                for name, buffer in self._tiles.items()
            },
        )

    def merge_beam(
        self,
        beam: CpuBeam,
        candidates: Candidates,
        scores: Float32[np.ndarray, " total"],
        *,
        keep: int,
        capacity: int,
        width: int,
        forget: bool,
    ) -> Frontier:
        self._merge(beam.pool, beam, candidates, scores, _ALL_ALLOWED, keep, capacity, beam.nonfinite)
        if beam.answer is not None:
            uncounted = np.zeros(beam.batch, dtype=np.int64)
            allowed = self._allowed(beam, candidates)
            self._merge(beam.answer, beam, candidates, scores, allowed, keep, capacity, uncounted)
        frontier = np.empty((beam.batch, width), dtype=np.int32)
        count = np.empty(beam.batch, dtype=np.int32)
        pool = beam.pool
        kernels.advance(beam.visited, pool.keys, pool.expanded, pool.size, forget, width, frontier, count)
        return Frontier(frontier, count)

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

    def _allowed(self, beam: CpuBeam, candidates: Candidates) -> np.ndarray:
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
        candidates: Candidates,
        scores: np.ndarray,
        allowed: np.ndarray,
        keep: int,
        capacity: int,
        nonfinite: np.ndarray,
    ) -> None:
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
