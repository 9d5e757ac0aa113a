"""One typed launch for each kernel of `kernels/`, on a lane's stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nann.engine.cuda.errors import device_errors
from nann.engine.cuda.modules import Modules

__all__ = ["Candidates", "DeviceGates", "Launches", "Pools"]

_INT_BYTES, _FLOAT_BYTES, _KEY_BYTES = 4, 4, 8
_SCRATCH_INTS = 64  # as in common.cuh
_WARP = 32
_USUAL_SHARED_BYTES = 48 * 1024  # what any device gives a block without asking
_NOTHING = np.uint64(0)  # a null pointer


@dataclass(slots=True)
class Candidates:
    """Where the candidates of a batch lie on the device, as the kernels take it (see `merge.cu`).

    `items` is None for the items from `first_item` on, the same for every query; without `item_start`
    those of query b begin at ``b * item_stride``.
    """

    items: Any | None
    item_start: Any = _NOTHING
    item_stride: int = 0
    first_item: int = 0
    count: Any = _NOTHING
    all_count: int = 0
    tile_start: Any = _NOTHING


@dataclass(frozen=True, slots=True)
class DeviceGates:
    """A batch's `GateBatch` on the device, by addresses; a query's keys are `stride` apart."""

    dim: int
    stride: int
    bias: Any
    keys: Any
    context: Any
    known: Any
    rank: Any
    margin: Any
    residual_weight: Any


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of a batch: ``keys`` uint64 [n_pools, batch, capacity], each sorted as far as it is in use.

    `name` is the lane's buffer they lie in.
    """

    keys: Any
    capacity: int
    name: str = ""

    @classmethod
    def none(cls) -> Pools:
        """Those of a batch that holds nothing yet."""
        return cls(_NOTHING, 0)


class Launches:
    """Launches kernels on one lane's stream, and counts them.

    Device memory is given as a CuPy array, or by its address as a `numpy.uint64`.
    """

    def __init__(self, modules: Modules, stream: Any) -> None:
        self._modules = modules
        self._stream = stream
        self.sizes = modules.sizes
        self.count = 0

    def expand(
        self,
        *,
        batch: int,
        neighbors: Any,
        frontier: Any,
        frontier_count: Any,
        width: int,
        visited: Any,
        words: int,
        items: Any,
        item_stride: int,
        tile_rows: int,
        plan: tuple[Any, Any, Any, Any, Any],
    ) -> None:
        """`expand` of `expand.cu`; ``plan`` = (cursor, count, tile_start, ticket, report)."""
        degree = neighbors.shape[1]
        self._launch(
            "expand",
            (-(-width * degree // self.sizes.expand_block), batch),
            self.sizes.expand_block,
            _SCRATCH_INTS * _INT_BYTES,
            neighbors,
            np.int32(degree),
            frontier,
            frontier_count,
            np.int32(width),
            visited,
            np.int64(words),
            items,
            np.int64(item_stride),
            np.int32(tile_rows),
            *plan,
        )

    def seed(
        self,
        *,
        batch: int,
        rows: Any,
        row_start: Any,
        row_count: Any,
        longest: int,
        keys: bool,
        visited: Any,
        words: int,
        items: Any,
        item_stride: int,
        tile_rows: int,
        plan: tuple[Any, Any, Any, Any, Any],
    ) -> None:
        """`seed` of `expand.cu`; no query has more than ``longest`` rows, which are ``keys`` or items."""
        self._launch(
            "seed",
            (-(-longest // self.sizes.expand_block), batch),
            self.sizes.expand_block,
            _SCRATCH_INTS * _INT_BYTES,
            rows,
            row_start,
            row_count,
            np.int32(2 if keys else 1),
            np.int32(1 if keys else 0),
            visited,
            np.int64(words),
            items,
            np.int64(item_stride),
            np.int32(tile_rows),
            *plan,
        )

    def estimate(
        self,
        *,
        batch: int,
        neighbors: Any,
        frontier: Any,
        frontier_score: Any,
        frontier_count: Any,
        width: int,
        visited: Any,
        words: int,
        pools: Pools,
        sizes: Any,
        queries: Any,
        gates: DeviceGates,
        found: Any,
        found_stride: int,
        n_found: Any,
        estimated: Any,
    ) -> None:
        """`estimate` of `gate.cu`; ``queries`` float16 [N, columns]."""
        degree, columns = neighbors.shape[1], queries.shape[1]
        block = self.sizes.gate_block
        while _gate_shared_bytes(block, columns) > _USUAL_SHARED_BYTES and block > _WARP:
            block //= 2
        nodes = min(width, max(1, block // (degree + 1)))
        self._launch(
            "estimate",
            (-(-width // nodes), batch),
            block,
            _gate_shared_bytes(block, columns),
            neighbors,
            np.int32(degree),
            frontier,
            frontier_score,
            frontier_count,
            np.int32(width),
            visited,
            np.int64(words),
            pools.keys,
            np.int32(pools.capacity),
            sizes,
            np.uint64(queries.data.ptr),  # its bits, as the kernel takes them
            np.int32(gates.dim),
            np.int32(columns - 1 - gates.dim),
            gates.bias,
            gates.keys,
            np.int32(gates.stride),
            gates.context,
            gates.known,
            gates.rank,
            gates.margin,
            gates.residual_weight,
            np.int32(nodes),
            found,
            np.int64(found_stride),
            n_found,
            estimated,
        )

    def room_to_choose(self, most_found: int) -> int:
        """The places of the table in which an item's estimates meet, of each query: `room` of `choose.cu`."""
        return _power_of_two(most_found + most_found // 2)

    def choose(
        self,
        *,
        batch: int,
        found: Any,
        found_stride: int,
        n_found: Any,
        known: Any,
        admit: int,
        spill: Any,
        room: int,
        visited: Any,
        words: int,
        items: Any,
        item_stride: int,
        tile_rows: int,
        frontier_count: Any,
        plan: tuple[Any, Any, Any, Any, Any],
    ) -> None:
        """`choose` of `choose.cu`; ``plan`` as for `expand`."""
        self._launch(
            "choose",
            (1, batch),
            self.sizes.merge_block,
            _SCRATCH_INTS * _INT_BYTES + min(room, self.sizes.sort_piece) * _KEY_BYTES,
            found,
            np.int64(found_stride),
            n_found,
            known,
            np.int32(admit),
            spill,
            np.int32(room),
            visited,
            np.int64(words),
            items,
            np.int64(item_stride),
            np.int32(tile_rows),
            frontier_count,
            *plan,
        )

    def gather(
        self,
        *,
        batch: int,
        tables: Any,
        candidates: Candidates,
        first_tile: int,
        tiles: int,
        tile_rows: int,
        tile_query: Any,
    ) -> None:
        """`gather` of `gather.cu`; ``tables`` int64 [n_tables, 4]."""
        self._launch(
            "gather",
            (tiles, tile_rows // self.sizes.gather_rows),
            self.sizes.gather_block,
            self.sizes.gather_rows * _INT_BYTES,
            tables,
            np.int32(tables.shape[0]),
            candidates.items,
            candidates.item_start,
            np.int64(candidates.item_stride),
            candidates.count,
            candidates.tile_start,
            np.int32(batch),
            np.int32(first_tile),
            np.int32(tile_rows),
            tile_query,
        )

    def room_for(self, most_candidates: int, *, keep: int, capacity: int) -> int:
        """The keys that a merge collects at a time, of each query: `room` of `merge.cu`."""
        enough = _power_of_two(most_candidates)
        if enough <= self.sizes.sort_piece:
            return enough
        return min(enough, max(self.sizes.sort_piece, _power_of_two(2 * min(keep, capacity))))

    def merge(
        self,
        *,
        batch: int,
        n_pools: int,
        candidates: Candidates,
        scores: Any,
        score_stride: int,
        old: Pools,
        new: Pools,
        keep: int,
        sizes: Any,
        filtered: Any,
        admissible: Any,
        visited: Any,
        words: int,
        forget: bool,
        frontier: Any,
        frontier_score: Any,
        frontier_count: Any,
        width: int,
        nonfinite: Any,
        spill: Any,
        room: int,
    ) -> None:
        """`merge` of `merge.cu`; scores lie by tile, or by query in rows of ``score_stride``."""
        items = candidates.items
        self._launch(
            "merge",
            (batch, n_pools),
            self.sizes.merge_block,
            _SCRATCH_INTS * _INT_BYTES + min(room, self.sizes.sort_piece) * _KEY_BYTES,
            scores,
            candidates.tile_start,
            np.int64(score_stride),
            _NOTHING if items is None else items,
            candidates.item_start,
            np.int64(candidates.item_stride),
            np.int32(candidates.first_item),
            candidates.count,
            np.int32(candidates.all_count),
            old.keys,
            np.int32(old.capacity),
            new.keys,
            np.int32(new.capacity),
            np.int32(keep),
            sizes,
            filtered,
            admissible,
            visited,
            np.int64(words),
            np.int32(forget),
            frontier,
            frontier_score,
            frontier_count,
            np.int32(width),
            nonfinite,
            spill,
            np.int32(room),
        )

    def admit(
        self,
        *,
        batch: int,
        filtered: Any,
        masks: Any,
        excluded: Any,
        excluded_start: Any,
        admissible: Any,
        words: int,
    ) -> None:
        """`admit` of `filters.cu`."""
        self._launch(
            "admit",
            (-(-words // self.sizes.filter_block), batch),
            self.sizes.filter_block,
            self.sizes.filter_block * _INT_BYTES,
            filtered,
            masks,
            excluded,
            excluded_start,
            admissible,
            np.int64(words),
        )

    def inner_products(
        self, *, vectors: Any, norms: Any, first: int, rows: int, queries: Any, batch: int, products: Any
    ) -> None:
        """`inner_products` of `scan.cu`; ``products`` has ``rows`` for each query."""
        tile, depth = self.sizes.scan_tile, self.sizes.scan_depth
        self._launch(
            "inner_products",
            (-(-rows // tile), -(-batch // tile)),
            tile * tile // 16,
            2 * depth * (tile + 4) * _FLOAT_BYTES,
            vectors,
            norms,
            np.int64(first),
            np.int32(rows),
            queries,
            np.int32(batch),
            np.int32(vectors.shape[1]),
            products,
            np.int64(rows),
        )

    def _launch(
        self, kernel: str, grid: tuple[int, int], block: int, shared_bytes: int, *arguments: Any
    ) -> None:
        with device_errors(f"launching {kernel}"):
            self._modules[kernel](grid, (block,), arguments, shared_mem=shared_bytes, stream=self._stream)
        self.count += 1


def _gate_shared_bytes(block: int, columns: int) -> int:
    return (_SCRATCH_INTS + 3 * block) * _INT_BYTES + columns * (block + 1) * _FLOAT_BYTES


def _power_of_two(least: int) -> int:
    """The smallest power of two of at least `least`, and of 32: less would save nothing."""
    return max(32, 1 << (least - 1).bit_length()) if least > 0 else 32
