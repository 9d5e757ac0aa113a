"""What the CUDA backend hands out: a batch's beam, and the candidates of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Admission
from nann.engine.cuda.lane_state import Counted
from nann.engine.cuda.launches import Candidates, DeviceGates, Pools

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64, UInt64

__all__ = ["CudaBeam", "CudaCandidates", "Place", "unpack"]

_SIGN = np.uint32(0x80000000)
_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_1 = np.uint64(1)


class CudaBeam:
    """One batch's state, valid until the lane's next `begin`. The arrays are on the device; here are what
    the host must know of them: how the pools lie, how large they and the frontier can be at most."""

    def __init__(
        self,
        batch: int,
        admissions: Sequence[Admission | None],
        gates: DeviceGates | None,
        frontier_count: Any,
        read_counted: Callable[[], Counted],
    ) -> None:
        self.batch = batch
        self.admissions = admissions
        self.gates = gates
        self.n_pools = 2 if any(admission is not None for admission in admissions) else 1
        self.pools = Pools.none()
        self.frontier: Any | None = None  # int32, [batch, width] of it
        self.frontier_score: Any | None = None  # float32, likewise
        self.frontier_count: Any = frontier_count  # int32, [batch]
        self.most_held = 0  # no query's pool holds more
        self.width = 0  # no query's frontier holds more
        self.forgot = False  # since `forget`, an answer may hold an item twice
        self.counted: Counted | None = None  # until the next kernel that counts
        self.steps: list[Int32[np.ndarray, " batch"]] = []
        self._read_counted = read_counted

    @property
    def nonfinite(self) -> Int64[np.ndarray, " batch"]:
        """Read from the device unless `to_host` just brought them along."""
        return self._counted().nonfinite

    @property
    def estimated(self) -> Int64[np.ndarray, " batch"]:
        """Likewise."""
        return self._counted().estimated

    @property
    def scored_per_step(self) -> Int32[np.ndarray, "steps batch"]:
        return np.array(self.steps, dtype=np.int32).reshape(len(self.steps), self.batch)

    def _counted(self) -> Counted:
        if self.counted is None:
            self.counted = self._read_counted()
        return self.counted


@dataclass(slots=True)
class CudaCandidates:
    """How many candidates each query has, and where they lie on the device.

    `common` is the range that all queries share when its items are written nowhere. The scores of query b
    begin at its first tile, or at row b of a common range; a tile or row is `score_stride` long.
    """

    counts: Int32[np.ndarray, " batch"]
    most: int  # of counts
    where: Candidates
    n_tiles: int = 0
    common: range | None = None
    scores: Any | None = None
    score_stride: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the candidates some tiles are: of the planned tiles, or of the common range's items."""

    first: int
    count: int
    whole: bool


def unpack(
    keys: UInt64[np.ndarray, "*shape"],
) -> tuple[Int32[np.ndarray, "*shape"], Float32[np.ndarray, "*shape"]]:
    """The items and scores of keys as `common.cuh` defines them."""
    items = ((keys & _LOW32) >> _1).astype(np.int32)
    up = ~(keys >> _32).astype(np.uint32)
    return items, np.where(up & _SIGN, up ^ _SIGN, ~up).view(np.float32)
