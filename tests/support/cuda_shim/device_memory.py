"""Who owns which bytes: allocations, the budget of a device, and which allocation an address lies in."""

from __future__ import annotations

import bisect
import weakref
from typing import Any

import numpy as np

from cuda_shim.errors import OutOfMemoryError
from cuda_shim.program import DeviceBytes, host_view

# cupy/cuda/memory.pyx, ALLOCATION_UNIT_SIZE: the pool gives out multiples of this.
_UNIT_BYTES = 512


class Handle:
    """What Python objects hold while they need an allocation; the last one to go releases it."""

    __slots__ = ("__weakref__", "allocation")

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation


class Allocation:
    """Some guarded memory of a device, or pinned memory of the host (`device` None)."""

    def __init__(
        self, device: int | None, nbytes: int, stream_ptr: int, poison: int, released: list[Allocation]
    ) -> None:
        self.device = device
        self.nbytes = nbytes
        self.stream_ptr = stream_ptr
        self._bytes = DeviceBytes(nbytes, poison)
        self.address = self._bytes.address
        self._released = released

    def handle(self) -> Handle:
        """To be called once: the allocation is released when the handle goes."""
        handle = Handle(self)
        weakref.finalize(handle, self._released.append, self).atexit = False
        return handle

    def close(self) -> None:
        """Makes the memory inaccessible; raises KernelFault if something was written around it."""
        self._bytes.free()


class Budget:
    """How much memory a device has and a pool holds of it; sizes in bytes.

    A pool keeps what was given back (`held`) until it is told to let go, so that is what the device's free
    memory lacks.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.held = 0
        self.pool_limit = 0  # 0: none
        self.largest: int | None = None  # fault injection: refuse anything larger
        self.outside = 0  # taken by others than the pool: XLA, another process

    def take(self, nbytes: int) -> None:
        """Raises OutOfMemoryError when the pool's limit or the device's memory would be exceeded."""
        size = round_up(nbytes)
        most = self.total - self.outside
        if self.pool_limit:
            most = min(most, self.pool_limit)
        if self.used + size > most or (self.largest is not None and nbytes > self.largest):
            raise OutOfMemoryError(size, self.used, self.pool_limit)
        self.used += size
        self.held = max(self.held, self.used)

    def give_back(self, nbytes: int) -> None:
        """Returns an allocation's bytes to the pool."""
        self.used -= round_up(nbytes)

    @property
    def free(self) -> int:
        """What cudaMemGetInfo calls free."""
        return max(0, self.total - self.outside - self.held)


def round_up(nbytes: int) -> int:
    """To the pool's unit, in which pinned memory comes as well."""
    return -(-nbytes // _UNIT_BYTES) * _UNIT_BYTES


class AddressSpace:
    """Finds the live allocation that some bytes lie in."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, Allocation] = {}

    def add(self, allocation: Allocation) -> None:
        """Makes an allocation known."""
        bisect.insort(self._starts, allocation.address)
        self._by_start[allocation.address] = allocation

    def remove(self, allocation: Allocation) -> None:
        """Forgets one."""
        del self._starts[bisect.bisect_left(self._starts, allocation.address)]
        del self._by_start[allocation.address]

    def find(self, address: int, nbytes: int = 1) -> Allocation | None:
        """The allocation that holds all of [address, address + nbytes), if one does."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        allocation = self._by_start[self._starts[at]]
        return allocation if address + nbytes <= allocation.address + max(allocation.nbytes, 1) else None

    def __len__(self) -> int:
        return len(self._starts)

    def live(self) -> list[Allocation]:
        """All live allocations."""
        return list(self._by_start.values())


def bytes_at(address: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Raw memory as uint8."""
    return host_view(address, (nbytes,), np.uint8)
