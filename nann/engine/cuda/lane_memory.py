"""One lane's memory, on its GPU and pinned on the host: taken once, from limits, and grown only on demand."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.cuda.errors import device_errors

if TYPE_CHECKING:
    from jaxtyping import Bool

    from nann.engine.scoring.buckets import BucketGrid

__all__ = ["LaneLimits", "LaneMemory", "MaskCache"]

_ALIGNMENT_BYTES = 16  # of what the kernels read in words of 16 bytes
_WORD_BITS = 32
_MASKS_KEPT = 16  # filters in use at a time, by a guess; a mask is N / 8 bytes
_STAGED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """What a lane takes scratch memory for at first; a larger request grows it, once.

    ``capacity``, ``width`` and ``candidates`` are of one query: its pool, its frontier, and its candidates of
    a step. The defaults hold a pool of the largest `k` with room for filters, and a frontier of 256 nodes
    with 32 neighbours each. ``gate_bytes`` are a query's side of its gate: 56 known items of 17 numbers, and
    what there is once.
    """

    capacity: int = 4096
    width: int = 256
    candidates: int = 8192
    gate_bytes: int = 4096

    def elements(
        self, grid: BucketGrid, num_items: int, *, scans: bool, gated: bool
    ) -> dict[str, tuple[Any, int]]:
        """Type and number of elements of each growing buffer to begin with.

        ``scans``: there are item vectors; ``gated``: there are tables for a gate.
        """
        batch = grid.max_batch
        return {
            "items": (np.int32, batch * self.candidates),
            "frontier": (np.int32, batch * self.width),
            "scores of the frontier": (np.float32, batch * self.width),
            "gates": (np.uint8, batch * self.gate_bytes if gated else 0),
            "found by a gate": (np.uint64, batch * self.candidates if gated else 0),
            "keys": (np.uint64, 2 * batch * self.capacity),
            "other keys": (np.uint64, 2 * batch * self.capacity),
            "scan keys": (np.uint64, batch * self.capacity if scans else 0),
            "other scan keys": (np.uint64, batch * self.capacity if scans else 0),
            "spill": (np.uint64, 0),
            # A scan in several calls keeps its scores until they are merged; so does a step too large.
            "scores": (np.float32, batch * grid.scan_rows if grid.crossed_rows is not None else 0),
            "inputs": (np.uint8, _STAGED_BYTES),
            "masks": (np.uint32, _MASKS_KEPT * -(-num_items // _WORD_BITS)),
        }

    def plan(
        self,
        grid: BucketGrid,
        num_items: int,
        item_state: Mapping[str, np.ndarray],
        *,
        scans: bool,
        gated: bool,
    ) -> dict[str, int]:
        """Bytes of one lane, by what they are for."""
        words = -(-num_items // _WORD_BITS)
        growing = sum(
            np.dtype(dtype).itemsize * size
            for dtype, size in self.elements(grid, num_items, scans=scans, gated=gated).values()
        )
        tiles = sum(math.prod(table.shape[1:]) * table.itemsize for table in item_state.values())
        return {
            "bitmaps of visited and admissible items": 8 * grid.max_batch * words,
            "pools, candidates, filters, gates and inputs": growing,
            "tiles for the scorer": grid.max_rows * tiles,
        }


class LaneMemory:
    """Device and pinned memory that belongs to one lane and its stream.

    ``n_growths`` counts the buffers that had to grow since the lane began.
    """

    def __init__(self, stream: Any, elements: Mapping[str, tuple[Any, int]]) -> None:
        self._stream = stream
        self._dtypes = {name: dtype for name, (dtype, _) in elements.items()}
        self._buffers: dict[str, Any] = {
            name: self.new(name, max(1, size), dtype) for name, (dtype, size) in elements.items()
        }
        self._staging = self.pinned("staged inputs", _STAGED_BYTES, np.uint8)
        self._staging_address = self._staging.ctypes.data
        self._staged = 0
        self.n_growths = 0

    def new(self, name: str, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """Device memory of the lane's stream, of any content.

        Raises:
            BackendError: there is not that much left; names ``name`` and the size.
        """
        import cupy

        size = math.prod(shape) if isinstance(shape, tuple) else shape
        with device_errors(f"taking {size * np.dtype(dtype).itemsize} bytes for {name}"), self._stream:
            return cupy.empty(shape, dtype=dtype)

    def pinned(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """Host memory that the device reads and writes by its address, 1-D."""
        import cupy

        n_bytes = max(1, size) * np.dtype(dtype).itemsize
        with device_errors(f"taking {n_bytes} bytes of pinned host memory for {name}"):
            memory = cupy.cuda.alloc_pinned_memory(n_bytes)
        return np.frombuffer(memory, dtype=dtype, count=size)

    def at_least(self, name: str, size: int) -> Any:
        """A growing buffer, 1-D, of at least ``size`` elements; what it held is lost when it grows."""
        buffer = self._buffers[name]
        if buffer is not None and buffer.size >= size:
            return buffer
        # Given back before the new one is taken, and not before its last use: CuPy's pool keeps memory for
        # the stream it was taken for, whose work runs in order.
        buffer = self._buffers[name] = None
        self._buffers[name] = self.new(name, _grown(size), self._dtypes[name])
        self.n_growths += 1
        return self._buffers[name]

    # -- from the host -------------------------------------------------------------------------------

    def staged_may_be_reused(self) -> None:
        """Tell that the lane's stream is idle, so that what was staged has been copied."""
        self._staged = 0

    def upload(self, *arrays: np.ndarray, into: str = "inputs") -> list[Any]:
        """Copy arrays to the device in the stream's order, by one transfer; returns their addresses.

        They stay there until the next `upload` into that growing buffer.
        """
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        inputs = self.at_least(into, end)
        first = self._stage(end)
        for start, array in zip(starts, arrays, strict=True):
            self._fill(first + start, array)
        self._copy(inputs.data.ptr, first, end)
        return [np.uint64(inputs.data.ptr + start) for start in starts]

    def upload_to(self, address: int, array: np.ndarray) -> None:
        """Copy an array to a place of its own on the device, in the stream's order."""
        first = self._stage(array.nbytes)
        self._fill(first, array)
        self._copy(address, first, array.nbytes)

    def _stage(self, n_bytes: int) -> int:
        """Where in the staging memory ``n_bytes`` begin that no transfer under way reads."""
        n_bytes = -(-n_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._staged + n_bytes > self._staging.size:
            with device_errors("waiting for earlier inputs"):
                self._stream.synchronize()
            self._staged = 0
            if n_bytes > self._staging.size:
                self._staging = self.pinned("staged inputs", _grown(n_bytes), np.uint8)
                self._staging_address = self._staging.ctypes.data
                self.n_growths += 1
        first = self._staged
        self._staged += n_bytes
        return first

    def _fill(self, first: int, array: np.ndarray) -> None:
        self._staging[first : first + array.nbytes].view(array.dtype)[...] = array.reshape(-1)

    def _copy(self, address: int, first: int, n_bytes: int) -> None:
        import cupy

        runtime = cupy.cuda.runtime
        with device_errors(f"uploading {n_bytes} bytes"):
            source = self._staging_address + first
            runtime.memcpyAsync(address, source, n_bytes, runtime.memcpyHostToDevice, self._stream.ptr)


class MaskCache:
    """Filters' masks as bitmaps on the device, the last few used, known by the identity of the host's array.

    `Admission.mask` is one object for each filter (`nann.engine.filters`), so identity finds what recurs.
    """

    def __init__(self, memory: LaneMemory, words: int) -> None:
        self._memory = memory
        self._words = words
        self._slots: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
        self._free = list(range(_MASKS_KEPT))

    def addresses(self, masks: Sequence[Bool[np.ndarray, " N"] | None], own_rows: Sequence[int]) -> list[int]:
        """Where each mask lies: in the cache, or in its own row (an address) when one batch has too many.

        0 for None. They stay there until the next call.
        """
        wanted = {id(mask) for mask in masks if mask is not None}
        for key in wanted & self._slots.keys():
            self._slots.move_to_end(key)
        return [
            0 if mask is None else self._place(mask, own_row, wanted)
            for mask, own_row in zip(masks, own_rows, strict=True)
        ]

    def _place(self, mask: Bool[np.ndarray, " N"], own_row: int, wanted: set[int]) -> int:
        if id(mask) in self._slots:
            return self._address(self._slots[id(mask)][1])
        if not self._free and self._slots and (oldest := next(iter(self._slots))) not in wanted:
            self._free.append(self._slots.pop(oldest)[1])
        if not self._free:
            self._memory.upload_to(own_row, self._packed(mask))
            return own_row
        slot = self._free.pop()
        self._memory.upload_to(self._address(slot), self._packed(mask))
        self._slots[id(mask)] = (mask, slot)
        return self._address(slot)

    def _address(self, slot: int) -> int:
        buffer = self._memory.at_least("masks", _MASKS_KEPT * self._words)
        return int(buffer.data.ptr) + 4 * slot * self._words

    def _packed(self, mask: Bool[np.ndarray, " N"]) -> np.ndarray:
        packed = np.zeros(4 * self._words, dtype=np.uint8)
        bits = np.packbits(mask, bitorder="little")
        packed[: bits.size] = bits
        return packed


def _grown(size: int) -> int:
    """Room for more than was asked for, so that a slowly growing request does not grow a buffer each time."""
    return 1 << (size - 1).bit_length()
