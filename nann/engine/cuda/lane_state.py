"""What a lane keeps of the batch it is searching for, on the device, and how the host learns of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.cuda.errors import device_errors

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64, UInt8, UInt64

    from nann.engine.cuda.lane_memory import LaneMemory
    from nann.engine.cuda.launches import Pools

__all__ = ["Counted", "Found", "LaneState"]

_INT_BYTES, _KEY_BYTES = 4, 8
_ALIGNMENT_BYTES = 16
_USUAL_K = 1024


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted of each query so far: scores that were not finite, and a gate's estimates."""

    nonfinite: Int64[np.ndarray, " batch"]
    estimated: Int64[np.ndarray, " batch"]


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of a batch: how many keys each pool holds, the first of them, and what was counted."""

    sizes: Int32[np.ndarray, "pools batch"]
    keys: list[UInt64[np.ndarray, "batch width"]]
    counted: Counted


class LaneState:
    """Counters and bitmaps of up to ``batch`` queries over items of ``words`` words of 32 bits.

    Public attributes are arrays or addresses as the kernels take them (`expand.cu`, `gate.cu`, `merge.cu`):
    `nonfinite`, `estimated`, `sizes`, `frontier_count`, `n_found`, `visited`, `admissible`, `filtered`;
    `plan` = cursor, count, tile_start, ticket and report.
    """

    def __init__(self, memory: LaneMemory, stream: Any, *, batch: int, words: int) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._memory = memory
        self._stream = stream
        self._words = words
        with device_errors("making an event"):
            # The wait for an event without eventBlockingSync spins, without Python's lock: a step is waited
            # for tens of microseconds, about what waking a sleeping thread takes.
            self._event = cupy.cuda.Event(disable_timing=True)
        # What a search begins with as zeros is one piece: counters, of which an answer needs the first three,
        # then the bitmaps of visited items.
        sizes = [8 * batch, 8 * batch, 8 * batch, *[_INT_BYTES * batch] * 3, _INT_BYTES]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)]).tolist()
        self._estimated_start, self._sizes_start, self._keys_start = starts[1:4]
        self._counter_bytes = starts[-1]
        self._zeroed = memory.new("visited items", starts[-1] + _INT_BYTES * batch * words, np.uint8)
        address = int(self._zeroed.data.ptr)
        addresses = [np.uint64(address + start) for start in starts]
        self.nonfinite, self.estimated, self.sizes, self.frontier_count, self.n_found = addresses[:5]
        cursor, ticket, self.visited = addresses[5:]
        self.admissible = memory.new("admissible items", (batch, words), np.uint32)
        self.filtered = memory.new("which queries have a filter", batch, np.int32)
        count = memory.new("counts of candidates", batch, np.int32)
        tile_start = memory.new("first tiles of queries", batch + 1, np.int32)
        self._report = memory.pinned("reports", 2 * batch, np.int32)
        self._answers = memory.pinned("answers", self._keys_start + _USUAL_K * _KEY_BYTES * batch, np.uint8)
        # With unified addressing the device knows pinned host memory by the host's own address. The last
        # block of `expand` writes there what the host must know, so that no copy has to follow the kernel.
        self.plan = (cursor, count, tile_start, ticket, np.uint64(self._report.ctypes.data))

    def clear(self, batch: int) -> None:
        """Begin a search of ``batch`` queries, whatever became of the one before."""
        with device_errors("beginning a search"):
            self._stream.synchronize()  # only a search that broke off has left anything to wait for
            self._memory.staged_may_be_reused()
            n_bytes = self._counter_bytes + _INT_BYTES * batch * self._words
            self._runtime.memsetAsync(int(self._zeroed.data.ptr), 0, n_bytes, self._stream.ptr)

    def forget(self, batch: int) -> None:
        """No item is visited any more."""
        with device_errors("forgetting what was visited"):
            n_bytes = _INT_BYTES * batch * self._words
            self._runtime.memsetAsync(int(self.visited), 0, n_bytes, self._stream.ptr)

    def reported(self, batch: int) -> tuple[Int32[np.ndarray, " batch"], Int32[np.ndarray, " batch"]]:
        """What the last plan says: counts of candidates, and of nodes that were expanded. Waits for it."""
        self._wait("waiting for a step")
        report = self._report[: 2 * batch].copy()
        return report[:batch], report[batch:]

    def visited_by(self, query: int) -> UInt8[np.ndarray, " bytes"]:
        """A query's bitmap of visited items, in memory that the next answer may overwrite."""
        n_bytes = _INT_BYTES * self._words
        bitmap = self._room(n_bytes)
        self._fetch(bitmap, int(self.visited) + query * n_bytes)
        self._wait("reading what was visited")
        return bitmap

    def found(self, batch: int, pools: Pools, widths: Sequence[int]) -> Found:
        """The first ``widths[p]`` keys of every query's pool p, of which `sizes` are real.

        The keys are in memory that the next answer may overwrite.
        """
        answers = self._room(self._keys_start + _KEY_BYTES * batch * sum(widths))
        self._fetch(answers[: self._keys_start], int(self.nonfinite))
        rest, keys = answers[self._keys_start :].view(np.uint64), []
        for pool, width in enumerate(widths):
            keys.append(rest[: batch * width].reshape(batch, width))
            rest = rest[batch * width :]
            self._fetch_keys(keys[-1], pools, pool)
        self._wait("reading the answer")
        sizes = answers[self._sizes_start :].view(np.int32)[: len(widths) * batch]
        counted = Counted(
            answers[: 8 * batch].view(np.int64).copy(),
            answers[self._estimated_start :][: 8 * batch].view(np.int64).copy(),
        )
        return Found(sizes.reshape(len(widths), batch).copy(), keys, counted)

    def _room(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        if self._answers.size < n_bytes:
            self._answers = self._memory.pinned("answers", 2 * n_bytes, np.uint8)
        return self._answers[:n_bytes]

    def _fetch(self, into: np.ndarray, address: int) -> None:
        with device_errors("reading from the device"):
            self._runtime.memcpyAsync(
                into.ctypes.data, address, into.nbytes, self._runtime.memcpyDeviceToHost, self._stream.ptr
            )

    def _fetch_keys(self, into: UInt64[np.ndarray, "batch width"], pools: Pools, pool: int) -> None:
        batch, width = into.shape
        if not width:
            return
        pitch = _KEY_BYTES * pools.capacity
        with device_errors("reading the answer"):
            self._runtime.memcpy2DAsync(
                into.ctypes.data,
                _KEY_BYTES * width,
                int(pools.keys.data.ptr) + pool * batch * pitch,
                pitch,
                _KEY_BYTES * width,
                batch,
                self._runtime.memcpyDeviceToHost,
                self._stream.ptr,
            )

    def _wait(self, operation: str) -> None:
        with device_errors(operation):
            self._event.record(self._stream)
            self._event.synchronize()
        self._memory.staged_may_be_reused()
