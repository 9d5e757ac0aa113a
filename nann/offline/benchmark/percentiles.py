"""The block of latency figures that NANN's own benchmark prints (reference/nann.md, "blaze-benchmark")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LatencyBlock"]

_MICROSECONDS = 1e6
_PERMILLES = (500, 750, 950, 980, 990, 999)


@dataclass(frozen=True, slots=True)
class LatencyBlock:
    """Distribution of a time over `count` requests, in microseconds.

    Percentiles are of the nearest rank: the smallest time not exceeded by that share of requests, so
    every figure is a time that was measured. `stddev_us` is that of the requests themselves (ddof 0).
    """

    count: int
    min_us: float
    max_us: float
    mean_us: float
    stddev_us: float
    median_us: float
    p75_us: float
    p95_us: float
    p98_us: float
    p99_us: float
    p99_9_us: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self | None:
        """The block of these times; None when there are none."""
        if not len(seconds):
            return None
        times = np.sort(np.asarray(seconds, dtype=np.float64)) * _MICROSECONDS
        # Integers, because 99.9 % of 1,000 is 999.0000000000001 in floating point, and that is rank 1,000.
        ranks = [times[-(-len(times) * permille // 1000) - 1] for permille in _PERMILLES]
        return cls(
            len(seconds),
            float(times[0]),
            float(times[-1]),
            float(times.mean()),
            float(times.std()),
            *(float(rank) for rank in ranks),
        )
