"""The search primitives on an NVIDIA GPU: CuPy's memory and the kernels of `kernels/`, on one stream a lane.

Everything a method enqueues runs in the order of the lane's stream. The host waits once a step, for the
counts of candidates that pick the scorer's shape, and once for the answer. A step is three launches of
ours: `gather`, `merge`, and the `expand` of the next step, which also plans how its candidates lie in tiles;
with gates `estimate` and `choose` take the place of `expand`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Admission, Tiles
from nann.engine.cuda.beam import CudaBeam, CudaCandidates, Place, unpack
from nann.engine.cuda.errors import device_errors
from nann.engine.cuda.gating import Gating
from nann.engine.cuda.lane_memory import LaneLimits, LaneMemory, MaskCache
from nann.engine.cuda.lane_state import LaneState
from nann.engine.cuda.launches import Candidates, Launches, Pools
from nann.engine.errors import Unsupported
from nann.engine.scoring.buckets import BucketGrid, Shape

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.engine.cuda.tables import DeviceTables
    from nann.engine.gate import Gate

__all__ = ["CudaBackend"]

_NOTHING = np.uint64(0)
_NO_ITEMS = np.empty(0, dtype=np.int32)
_NO_LIMIT = 2**31 - 1
_FLOAT_BYTES = 4
# A scan of item vectors keeps this many products of each query until they are merged: for 64 queries 16 MiB,
# which stay in the cache of an H100 (50 MiB); a merge reads them in 128 rounds of its block.
_SCAN_ROWS = 65536


class CudaBackend:
    """One lane: a stream, scratch memory, and the kernels over tables that other lanes share.

    ``stream`` is the lane's own. A scorer orders its programs before and after it (`handover.py`): what
    `take_scores` is given must be ordered on it already, and keep its memory until the work that the lane
    enqueues up to the next `merge_beam` has read it. ``launches`` counts the kernels launched and
    ``n_growths`` the buffers that had to grow since the lane was opened; both only ever rise.
    """

    def __init__(self, tables: DeviceTables, *, grid: BucketGrid, limits: LaneLimits | None = None) -> None:
        """A lane for batches of up to ``grid.max_batch`` queries, scored in the shapes of ``grid``.

        Raises:
            BackendError: its scratch does not fit, or the device failed.
        """
        import cupy

        self._runtime = cupy.cuda.runtime
        self._tables = tables
        self._grid = grid
        self._num_items = tables.num_items
        self._words = -(-tables.num_items // 32)
        with device_errors(f"opening a lane on cuda:{tables.device}"):
            self._device = cupy.cuda.Device(tables.device)
            self._device.use()
            self.stream = cupy.cuda.Stream(non_blocking=True)
        self._launch = Launches(tables.modules, self.stream)
        elements = (limits or LaneLimits()).elements(
            grid,
            tables.num_items,
            scans=tables.item_vectors is not None,
            gated=tables.gate_queries is not None,
        )
        self._memory = LaneMemory(self.stream, elements)
        self._masks = MaskCache(self._memory, self._words)
        self._state = LaneState(self._memory, self.stream, batch=grid.max_batch, words=self._words)
        self._gating = Gating(
            self._launch, self._memory, self._state, tables, words=self._words, tile_rows=grid.tile_rows
        )
        self._tiles = {
            name: self._memory.new(f"tiles of {name}", (grid.max_rows, *table.shape[1:]), table.dtype)
            for name, table in tables.item_state.items()
        }
        self._tile_query = self._memory.new("queries of tiles", grid.max_tiles, np.int32)
        self._views: dict[int, tuple[Any, Mapping[str, Any]]] = {}
        self._described = self._describe_tables()

    def __del__(self) -> None:
        # Pinned memory goes back to a pool that knows no streams, so no work may be left that uses it.
        with suppress(Exception):
            self.stream.synchronize()

    @property
    def launches(self) -> int:
        return self._launch.count

    @property
    def n_growths(self) -> int:
        return self._memory.n_growths

    # -- the search ------------------------------------------------------------------------------------

    def begin(
        self,
        batch: int,
        *,
        with_answer: Sequence[Admission | None],
        gates: Sequence[Gate | None] | None = None,
    ) -> CudaBeam:
        with device_errors("choosing the device"):
            self._device.use()  # which is this thread's affair, and a lane may change threads
        self._state.clear(batch)
        beam = CudaBeam(
            batch,
            with_answer,
            self._gating.upload(gates or ()),
            self._state.frontier_count,
            lambda: self._state.found(batch, Pools.none(), [0]).counted,
        )
        if beam.n_pools == 2:
            self._admit(with_answer)
        return beam

    def seed(self, beam: CudaBeam, rows: Sequence[Int32[np.ndarray, " n"]]) -> CudaCandidates:
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        if not (longest := int(lengths.max())):
            return self._step(beam, lengths, Candidates(None))
        starts = np.cumsum(lengths, dtype=np.int32) - lengths
        flat, row_start, row_count = self._memory.upload(np.concatenate(rows), starts, lengths)
        return self._seed(beam, flat, row_start, row_count, longest, keys=False)

    def nearest(
        self, beam: CudaBeam, vectors: Float32[np.ndarray, "batch dim"], count: int
    ) -> CudaCandidates:
        tables = self._tables
        if tables.item_vectors is None:
            raise Unsupported("this version carries no item vectors to scan")
        batch, count = beam.batch, min(count, self._num_items)
        starts, zeros = np.arange(batch, dtype=np.int32) * count, np.zeros(batch, dtype=np.int64)
        queries, row_start, sizes, nonfinite = self._memory.upload(
            np.ascontiguousarray(vectors, dtype=np.float32), starts, zeros, zeros
        )
        products = self._memory.at_least("scores", batch * min(_SCAN_ROWS, self._num_items))
        best = Pools.none()
        for first in range(0, self._num_items, _SCAN_ROWS):
            rows = min(_SCAN_ROWS, self._num_items - first)
            self._launch.inner_products(
                vectors=tables.item_vectors,
                norms=tables.norms,
                first=first,
                rows=rows,
                queries=queries,
                batch=batch,
                products=products,
            )
            part = CudaCandidates(
                np.full(batch, rows, dtype=np.int32),
                rows,
                Candidates(None, first_item=first, all_count=rows),
                scores=products,
                score_stride=rows,
            )
            best = self._merge(
                part,
                best,
                "scan keys",
                batch=batch,
                keep=_NO_LIMIT,
                capacity=count,
                sizes=sizes,
                nonfinite=nonfinite,
            )
        return self._seed(beam, np.uint64(best.keys.data.ptr), row_start, sizes, count, keys=True)

    def expand(self, beam: CudaBeam, level: int, *, admit: int = 0) -> CudaCandidates | None:
        if not beam.width:
            return None
        neighbors, state = self._tables.neighbors[level], self._state
        stride = min(self._num_items, beam.width * neighbors.shape[1])
        items = self._memory.at_least("items", beam.batch * stride)
        if beam.gates is not None and admit:
            self._gating.expand(beam, beam.gates, neighbors, admit, items, stride)
        else:
            self._launch.expand(
                batch=beam.batch,
                neighbors=neighbors,
                frontier=beam.frontier,
                frontier_count=beam.frontier_count,
                width=beam.width,
                visited=state.visited,
                words=self._words,
                items=items,
                item_stride=stride,
                tile_rows=self._grid.tile_rows,
                plan=state.plan,
            )
        counts, expanded = state.reported(beam.batch)
        return self._step(beam, counts, self._planned(items, stride)) if expanded.any() else None

    def listed(self, beam: CudaBeam, rows: Sequence[Int32[np.ndarray, " n"] | range]) -> CudaCandidates:
        counts = np.array([len(row) for row in rows], dtype=np.int32)
        first = rows[0]
        if isinstance(first, range) and all(_same(row, first) for row in rows):
            where = Candidates(None, first_item=first.start, all_count=len(first))
            return CudaCandidates(counts, len(first), where, common=first)
        return self._written(counts, rows)

    def gather(self, candidates: CudaCandidates, grid: BucketGrid) -> Iterator[Tiles]:
        if grid.tile_rows != self._grid.tile_rows or grid.max_rows > self._grid.max_rows:
            raise ValueError("the lane was opened for another grid")
        if candidates.common is not None:
            if grid.crossed_rows is not None:
                yield from self._crossed(candidates.common, grid.max_batch, grid.crossed_rows)
                return
            written = self._written(candidates.counts, [candidates.common] * len(candidates.counts))
            candidates.where, candidates.n_tiles, candidates.common = written.where, written.n_tiles, None
        for first in range(0, candidates.n_tiles, grid.max_tiles):
            count = min(grid.max_tiles, candidates.n_tiles - first)
            tiles = grid.tiles_for(count)
            self._launch.gather(
                batch=len(candidates.counts),
                tables=self._described,
                candidates=candidates.where,
                first_tile=first,
                tiles=tiles,
                tile_rows=grid.tile_rows,
                tile_query=self._tile_query,
            )
            tile_query, items = self._view(tiles)
            place = Place(first, count, count == candidates.n_tiles)
            yield Tiles(Shape(tiles, grid.tile_rows), tile_query, items, place)

    def take_scores(self, candidates: CudaCandidates, tiles: Tiles, scores: Any) -> None:
        place: Place = tiles.place
        rows = tiles.shape.rows
        if scores.dtype != np.float32 or tuple(scores.shape) != (tiles.shape.tiles, rows):
            raise ValueError(f"scores of {tiles.shape} cannot be {scores.dtype} {scores.shape}")
        if place.whole:
            # Not a copy: one launch less, and `merge` reads it where the scorer wrote it.
            candidates.scores, candidates.score_stride = scores, rows
            return
        if candidates.common is None:  # tiles, one below the other
            height, stride, copied = candidates.n_tiles, rows, (place.count, rows)
            first = place.first * rows
        else:  # some columns of every query's row
            height, stride = len(candidates.counts), len(candidates.common)
            first, copied = place.first, (height, place.count)
        candidates.scores = self._memory.at_least("scores", height * stride)
        candidates.score_stride = stride
        with device_errors("collecting scores"):
            self._runtime.memcpy2DAsync(
                candidates.scores.data.ptr + _FLOAT_BYTES * first,
                _FLOAT_BYTES * stride,
                scores.data.ptr,
                _FLOAT_BYTES * rows,
                _FLOAT_BYTES * copied[1],
                copied[0],
                self._runtime.memcpyDeviceToDevice,
                self.stream.ptr,
            )

    def merge_beam(
        self,
        beam: CudaBeam,
        candidates: CudaCandidates,
        *,
        keep: int,
        capacity: int,
        width: int,
        forget: bool,
    ) -> None:
        beam.most_held = min(capacity, beam.most_held + candidates.most)
        beam.width = min(width, beam.most_held)
        beam.frontier = self._memory.at_least("frontier", beam.batch * beam.width)
        beam.frontier_score = self._memory.at_least("scores of the frontier", beam.batch * beam.width)
        beam.forgot = beam.forgot or forget
        beam.counted = None
        if forget:
            self._state.forget(beam.batch)
        beam.pools = self._merge(
            candidates,
            beam.pools,
            "keys",
            batch=beam.batch,
            n_pools=beam.n_pools,
            keep=keep,
            capacity=capacity,
            forget=forget,
            frontier=beam.frontier,
            frontier_score=beam.frontier_score,
            width=beam.width,
            sizes=self._state.sizes,
            nonfinite=self._state.nonfinite,
        )
        candidates.scores = None

    def unvisited(self, beam: CudaBeam, query: int) -> Int32[np.ndarray, " n"]:
        bitmap = self._state.visited_by(query)
        visited = np.unpackbits(bitmap, bitorder="little", count=self._num_items)
        return np.flatnonzero(visited == 0).astype(np.int32)

    def to_host(
        self, beam: CudaBeam, k: Sequence[int]
    ) -> list[tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]]:
        pool_of = [0 if admission is None else 1 for admission in beam.admissions]
        widths = [0] * beam.n_pools
        for pool, wanted in zip(pool_of, k, strict=True):
            widths[pool] = max(widths[pool], min(wanted, beam.pools.capacity))
        if beam.forgot and beam.n_pools == 2:
            widths[1] = beam.pools.capacity  # an item that is there twice is one of the k
        found = self._state.found(beam.batch, beam.pools, widths)
        beam.counted = found.counted
        unpacked = [unpack(keys) for keys in found.keys]
        answers = []
        for b, (pool, wanted) in enumerate(zip(pool_of, k, strict=True)):
            size = int(found.sizes[pool, b])
            if pool and beam.forgot:
                answers.append(unpack(np.unique(found.keys[pool][b, :size])[:wanted]))
                continue
            items, scores = unpacked[pool]
            answers.append((items[b, : min(size, wanted)], scores[b, : min(size, wanted)]))
        return answers

    # -- pieces of the above -----------------------------------------------------------------------------

    def _admit(self, admissions: Sequence[Admission | None]) -> None:
        """Make the bitmaps of what the filtered queries may return."""
        state, batch = self._state, len(admissions)
        first_row, row_bytes = int(state.admissible.data.ptr), 4 * self._words
        masks = self._masks.addresses(
            [None if a is None else a.mask for a in admissions],
            [first_row + b * row_bytes for b in range(batch)],
        )
        excluded = [_NO_ITEMS if a is None else a.excluded for a in admissions]
        excluded_start = np.cumsum([0, *map(len, excluded)], dtype=np.int32)
        self._memory.upload_to(
            state.filtered.data.ptr, np.array([a is not None for a in admissions], dtype=np.int32)
        )
        on_device = self._memory.upload(
            np.array(masks, dtype=np.int64), np.concatenate(excluded), excluded_start
        )
        self._launch.admit(
            batch=batch,
            filtered=state.filtered,
            masks=on_device[0],
            excluded=on_device[1],
            excluded_start=on_device[2],
            admissible=state.admissible,
            words=self._words,
        )

    def _seed(
        self, beam: CudaBeam, rows: Any, row_start: Any, row_count: Any, longest: int, *, keys: bool
    ) -> CudaCandidates:
        items = self._memory.at_least("items", beam.batch * longest)
        self._launch.seed(
            batch=beam.batch,
            rows=rows,
            row_start=row_start,
            row_count=row_count,
            longest=longest,
            keys=keys,
            visited=self._state.visited,
            words=self._words,
            items=items,
            item_stride=longest,
            tile_rows=self._grid.tile_rows,
            plan=self._state.plan,
        )
        counts, _ = self._state.reported(beam.batch)
        return self._step(beam, counts, self._planned(items, longest))

    def _planned(self, items: Any, stride: int) -> Candidates:
        _, count, tile_start, _, _ = self._state.plan
        return Candidates(items, item_stride=stride, count=count, tile_start=tile_start)

    def _step(self, beam: CudaBeam, counts: Int32[np.ndarray, " batch"], where: Candidates) -> CudaCandidates:
        beam.steps.append(counts)
        n_tiles = int((-(-counts // self._grid.tile_rows)).sum())
        return CudaCandidates(counts, int(counts.max()), where, n_tiles)

    def _written(
        self, counts: Int32[np.ndarray, " batch"], rows: Sequence[Int32[np.ndarray, " n"] | range]
    ) -> CudaCandidates:
        """Rows of the host as candidates on the device, one query's after the other's."""
        items = np.concatenate(
            [np.arange(r.start, r.stop, r.step, dtype=np.int32) if isinstance(r, range) else r for r in rows]
        )
        starts = np.cumsum(counts, dtype=np.int64) - counts
        tile_start = np.cumsum([0, *(-(-counts // self._grid.tile_rows))], dtype=np.int32)
        on_device = self._memory.upload(items, starts, counts, tile_start)
        where = Candidates(on_device[0], item_start=on_device[1], count=on_device[2], tile_start=on_device[3])
        return CudaCandidates(counts, int(counts.max()), where, int(tile_start[-1]))

    def _crossed(self, items: range, users: int, rows: int) -> Iterator[Tiles]:
        """Consecutive items as they lie in the tables, which are padded for the last of them."""
        for first in range(0, len(items), rows):
            start, count = items.start + first, min(rows, len(items) - first)
            views = {
                name: table[start : start + rows].reshape(1, rows, *table.shape[1:])
                for name, table in self._tables.item_state.items()
            }
            yield Tiles(Shape(users, rows), None, views, Place(first, count, count == len(items)))

    def _merge(
        self,
        candidates: CudaCandidates,
        old: Pools,
        name: str,
        *,
        batch: int,
        keep: int,
        capacity: int,
        sizes: Any,
        nonfinite: Any,
        n_pools: int = 1,
        forget: bool = False,
        frontier: Any = _NOTHING,
        frontier_score: Any = _NOTHING,
        width: int = 0,
    ) -> Pools:
        """Merge into pools that lie in one of the two buffers called ``name``, out of those in the other."""
        memory, state = self._memory, self._state
        room = self._launch.room_for(candidates.most, keep=keep, capacity=capacity)
        spills = room > self._launch.sizes.sort_piece
        target = name if old.name != name else f"other {name}"
        new = Pools(memory.at_least(target, n_pools * batch * capacity), capacity, target)
        self._launch.merge(
            batch=batch,
            n_pools=n_pools,
            candidates=candidates.where,
            scores=_NOTHING if candidates.scores is None else candidates.scores,
            score_stride=candidates.score_stride,
            old=old,
            new=new,
            keep=keep,
            sizes=sizes,
            filtered=state.filtered,
            admissible=state.admissible,
            visited=state.visited,
            words=self._words,
            forget=forget,
            frontier=frontier,
            frontier_score=frontier_score,
            frontier_count=state.frontier_count,
            width=width,
            nonfinite=nonfinite,
            spill=memory.at_least("spill", n_pools * batch * room) if spills else _NOTHING,
            room=room,
        )
        return new

    def _view(self, tiles: int) -> tuple[Any, Mapping[str, Any]]:
        """The lane's tiles in one of the compiled shapes; made once, as it takes longer than a launch."""
        if tiles not in self._views:
            rows = self._grid.tile_rows
            items = {
                name: memory[: tiles * rows].reshape(tiles, rows, *memory.shape[1:])
                for name, memory in self._tiles.items()
            }
            self._views[tiles] = self._tile_query[:tiles], items
        return self._views[tiles]

    def _describe_tables(self) -> Any:
        """Tables and tiles as `gather.cu` takes them, int64 [tables, 4] on the device."""
        described = []
        for name, tiles in self._tiles.items():
            table = self._tables.item_state[name]
            row_bytes = int(np.prod(table.shape[1:], dtype=np.int64)) * table.itemsize
            log2 = next(log2 for log2 in (4, 2, 1, 0) if row_bytes % (1 << log2) == 0)
            described.append((int(table.data.ptr), int(tiles.data.ptr), row_bytes >> log2, log2))
        on_device = self._memory.new("descriptions of tables", (len(described), 4), np.int64)
        self._memory.upload_to(on_device.data.ptr, np.array(described, dtype=np.int64))
        return on_device


def _same(row: Int32[np.ndarray, " n"] | range, common: range) -> bool:
    return isinstance(row, range) and row == common and row.step == 1
