"""The gates of a lane's batches: their way to the device, and the step that asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.cuda.launches import DeviceGates, Launches
from nann.engine.errors import Unsupported
from nann.engine.gate import GateBatch

if TYPE_CHECKING:
    from nann.engine.cuda.beam import CudaBeam
    from nann.engine.cuda.lane_memory import LaneMemory
    from nann.engine.cuda.lane_state import LaneState
    from nann.engine.cuda.tables import DeviceTables
    from nann.engine.gate import Gate

__all__ = ["Gating"]

_NOTHING = np.uint64(0)


class Gating:
    """`expand` with gates on one lane, out of its memory and in the order of its stream."""

    def __init__(
        self,
        launch: Launches,
        memory: LaneMemory,
        state: LaneState,
        tables: DeviceTables,
        *,
        words: int,
        tile_rows: int,
    ) -> None:
        self._launch = launch
        self._memory = memory
        self._state = state
        self._queries = tables.gate_queries
        self._words = words
        self._tile_rows = tile_rows

    def upload(self, gates: Sequence[Gate | None]) -> DeviceGates | None:
        """A batch's gates, on the device until the next batch's; None where none is there.

        Raises:
            Unsupported: there is a gate, and there are no tables for one.
        """
        if all(gate is None for gate in gates):
            return None
        if self._queries is None:
            raise Unsupported("this version carries no tables for a gate")
        batch = GateBatch(gates, lanes=self._launch.sizes.gate_sums)
        addresses = self._memory.upload(
            batch.bias,
            batch.keys,
            batch.context,
            batch.known,
            batch.rank,
            batch.margin,
            batch.residual_weight,
            into="gates",
        )
        _, dim, stride = batch.keys.shape
        return DeviceGates(dim, stride, *addresses)

    def expand(
        self, beam: CudaBeam, gates: DeviceGates, neighbors: Any, admit: int, items: Any, item_stride: int
    ) -> None:
        """Write the candidates that pass to ``items``, `item_stride` a query, and the plan to the state."""
        launch, memory, state = self._launch, self._memory, self._state
        most = beam.width * neighbors.shape[1]
        found = memory.at_least("found by a gate", beam.batch * most)
        launch.estimate(
            batch=beam.batch,
            neighbors=neighbors,
            frontier=beam.frontier,
            frontier_score=beam.frontier_score,
            frontier_count=beam.frontier_count,
            width=beam.width,
            visited=state.visited,
            words=self._words,
            pools=beam.pools,
            sizes=state.sizes,
            queries=self._queries,
            gates=gates,
            found=found,
            found_stride=most,
            n_found=state.n_found,
            estimated=state.estimated,
        )
        beam.counted = None
        room = launch.room_to_choose(most)
        spills = room > launch.sizes.sort_piece
        launch.choose(
            batch=beam.batch,
            found=found,
            found_stride=most,
            n_found=state.n_found,
            known=gates.known,
            admit=admit,
            spill=memory.at_least("spill", beam.batch * room) if spills else _NOTHING,
            room=room,
            visited=state.visited,
            words=self._words,
            items=items,
            item_stride=item_stride,
            tile_rows=self._tile_rows,
            frontier_count=beam.frontier_count,
            plan=state.plan,
        )
