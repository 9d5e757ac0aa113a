"""CuPy's memory: pointers, the devices' pool, pinned memory (memory.pyx, pinned_memory.pyx)."""

from __future__ import annotations

import ctypes
from typing import Any

from cuda_shim.device_memory import Handle, round_up
from cuda_shim.errors import Misuse
from cuda_shim.machine import active
from cuda_shim.streams import Device, current_ptr, get_device_id


class BaseMemory:
    """Some device memory: `ptr`, `size` in bytes, `device_id`; `_handle` keeps it from being released."""

    def __init__(self, ptr: int, size: int, device_id: int, handle: object) -> None:
        self.ptr, self.size, self.device_id, self._handle = ptr, size, device_id, handle


class UnownedMemory(BaseMemory):
    """Memory of somebody else, who is kept alive."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        if device_id == -1:
            found = active().space.find(ptr)
            if found is None or found.device is None:
                raise Misuse("UnownedMemory over what is no device memory")
            device_id = found.device
        super().__init__(ptr, size, device_id, owner)


class MemoryPointer:
    """A place in a piece of memory."""

    def __init__(self, mem: BaseMemory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    @property
    def device(self) -> Device:
        """Where it is."""
        return Device(self.device_id)


def alloc(nbytes: int) -> MemoryPointer:
    """Memory of the current device from the pool, in the current stream's arena; 0 bytes have address 0."""
    machine = active()
    device = machine.current
    if nbytes == 0:
        return MemoryPointer(BaseMemory(0, 0, device.index, None), 0)
    allocation = machine.allocate(device, nbytes, current_ptr())
    return MemoryPointer(BaseMemory(allocation.address, nbytes, device.index, allocation.handle()), 0)


def alloc_pinned_memory(size: int) -> Any:
    """Pinned memory: an object with `ptr`, `mem` and the buffer protocol, as large as the pool makes it."""
    nbytes = round_up(size)
    allocation = active().allocate_pinned(nbytes)
    return _pinned_class(nbytes)._of(allocation.address, allocation.handle())


def _pinned_class(nbytes: int) -> Any:
    # np.frombuffer needs the buffer protocol, which before Python 3.12 only C types have: an array of ctypes.
    class PinnedMemoryPointer(ctypes.c_byte * nbytes):  # type: ignore[misc]
        """Over pinned memory; arrays over its buffer keep it."""

        ptr: int
        _handle: Handle

        @classmethod
        def _of(cls, address: int, handle: Handle) -> PinnedMemoryPointer:
            pointer: PinnedMemoryPointer = cls.from_address(address)
            pointer.ptr, pointer._handle = address, handle
            return pointer

        @property
        def mem(self) -> PinnedMemoryPointer:
            """The whole of it."""
            return self

        def size(self) -> int:
            """Bytes, rounded up from what was asked for."""
            return len(self)

        def __int__(self) -> int:
            return self.ptr

    return PinnedMemoryPointer


class MemoryPool:
    """The default pool: limits and sizes of the current device, bytes."""

    def _budget(self) -> Any:
        machine = active()
        with machine.lock:
            machine.collect()
        return machine.devices[get_device_id()].budget

    def used_bytes(self) -> int:
        """Held by arrays."""
        return int(self._budget().used)

    def total_bytes(self) -> int:
        """Held from the device."""
        return int(self._budget().held)

    def free_bytes(self) -> int:
        """Held from the device, by no array."""
        return self.total_bytes() - self.used_bytes()

    def free_all_blocks(self, stream: Any = None) -> None:
        """Gives what no array holds back to the device."""
        budget = self._budget()
        budget.held = budget.used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        """The most the pool takes from the device; 0 or nothing for no limit."""
        budget = self._budget()
        budget.pool_limit = int(budget.total * fraction) if fraction is not None else int(size or 0)

    def get_limit(self) -> int:
        """As set; 0 is no limit."""
        return int(self._budget().pool_limit)


_pool = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    """The one pool of all devices."""
    return _pool
