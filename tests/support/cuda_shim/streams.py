"""`cupy.cuda`'s Device, Stream and Event over the machine's queues (stream.pyx, device.pyx, version 14)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cuda_shim.errors import INVALID_HANDLE, CUDARuntimeError, Misuse
from cuda_shim.machine import LEGACY, NULL, PER_THREAD, Machine, Operation, Queue, active, thread_streams

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "Stream",
    "current_ptr",
    "get_current_stream",
    "get_device_id",
]


def get_device_id() -> int:
    """The calling thread's current device."""
    return int(getattr(active().local, "device", 0))


def set_device(index: int) -> None:
    """cudaSetDevice."""
    machine = active()
    machine.device(index)
    machine.local.device = index


class Device:
    """A device by number, by default the current one."""

    def __init__(self, device: int | Device | None = None) -> None:
        self._machine = active()
        self.id = get_device_id() if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        before = get_device_id()
        set_device(self.id)
        self._before.append(before)
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.local.device = self._before.pop()

    def use(self) -> None:
        """Makes the device current for this thread."""
        set_device(self.id)

    def synchronize(self) -> None:
        """Runs all work of the device."""
        machine = self._machine
        with machine.lock:
            device = machine.device(self.id)
            queues = [queue for queue in machine.queues.values() if queue.device is device]
            machine.synchronize([queue.waiting[-1] for queue in queues if queue.waiting])

    @property
    def mem_info(self) -> tuple[int, int]:
        """Free and total memory, bytes."""
        budget = self._machine.device(self.id).budget
        return budget.free, budget.total

    @property
    def compute_capability(self) -> str:
        """Of an H100: `90`."""
        self._machine.device(self.id)
        return "90"

    @property
    def pci_bus_id(self) -> str:
        """As nvidia-smi prints it."""
        return f"0000:{self.id:02X}:00.0"

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes our code reads, of an H100."""
        self._machine.device(self.id)
        return {
            "MaxThreadsPerBlock": 1024,
            "MaxSharedMemoryPerBlock": 48 * 1024,
            "MaxSharedMemoryPerBlockOptin": 227 * 1024,
            "MultiProcessorCount": 132,
            "WarpSize": 32,
            "ComputeCapabilityMajor": 9,
            "ComputeCapabilityMinor": 0,
        }


class _Stream:
    """What Stream and ExternalStream share."""

    ptr: int
    device_id: int

    def __init__(self, ptr: int, device_id: int, machine: Machine | None) -> None:
        self.ptr = ptr
        self.device_id = device_id
        self._own = machine

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.ptr == self.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    @property
    def _machine(self) -> Machine:
        machine = active()
        if self._own is not None and self._own is not machine:
            raise Misuse("a stream outlived its test")
        return machine

    @property
    def _queue(self) -> Queue:
        return self._machine.queue(self.ptr)

    def _check_device(self) -> int:
        current = get_device_id()
        if self.device_id not in (-1, current):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id})"
                f" does not match with the current device ({current})"
            )
        return current

    def __enter__(self) -> Any:
        device = self._check_device()
        streams = thread_streams(self._machine)
        stack = getattr(self._machine.local, "stack", [])
        stack.append((device, streams.get(device)))
        self._machine.local.stack = stack
        streams[device] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        device, before = self._machine.local.stack.pop()
        thread_streams(self._machine)[device] = before

    def use(self) -> Any:
        """Makes this the thread's current stream of its device, which must be current."""
        thread_streams(self._machine)[self._check_device()] = self
        return self

    @property
    def done(self) -> bool:
        """Whether all work is done; asking lets some of it happen, as time would."""
        queue = self._queue
        self._machine.wander(4)
        return not queue.waiting

    def synchronize(self) -> None:
        """Runs all work of the stream."""
        self._machine.synchronize_queue(self._queue)

    def record(self, event: Event | None = None) -> Event:
        """Records an event, by default a new one."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Later work of this stream follows what the event recorded last, as of now."""
        self._machine.wait(self._queue, event.recorded)

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        """Calls `callback(arg)` in the order of the stream."""
        self._machine.enqueue(self._queue, "host function", lambda: callback(arg))


class Stream(_Stream):
    """A new stream of the current device; the default streams, `null` and `ptds`, refuse work here."""

    null: Stream
    ptds: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        if null or ptds:
            super().__init__(NULL if null else PER_THREAD, -1, None)
            return
        machine = active()
        queue = machine.new_queue(machine.current)
        machine.counts["streams"] += 1
        super().__init__(queue.ptr, queue.device.index, machine)
        self.is_non_blocking = non_blocking

    @classmethod
    def from_external(cls, obj: Any) -> Stream:
        """A stream of another library, which names it by `__cuda_stream__`."""
        version, ptr = obj.__cuda_stream__()
        if version != 0:
            raise ValueError(f"__cuda_stream__() returned unsupported version {version}")
        stream = cls.__new__(cls)
        _Stream.__init__(stream, ptr, get_device_id(), active())
        return stream


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


class ExternalStream(_Stream):
    """A stream by its handle; deprecated since CuPy 14, so a warning (which our tests make an error)."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        warnings.warn(
            "ExternalStream is deprecated. Use Stream.from_external()", DeprecationWarning, stacklevel=2
        )
        super().__init__(ptr, device_id, active())


class Event:
    """An event of the current device."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self._machine = active()
        self.device_id = self._machine.current.index
        self.recorded: Operation | None = None
        self._machine.counts["events"] += 1

    @property
    def done(self) -> bool:
        """Whether what was recorded is done; asking lets some work happen, as time would."""
        if self.recorded is not None:
            self._machine.device(self.recorded.queue.device.index)
            self._machine.wander(4)
        return self.recorded is None or self.recorded.done

    def record(self, stream: _Stream | None = None) -> None:
        """Marks the end of what the stream (by default the current one) holds now."""
        queue = active().queue(current_ptr() if stream is None else stream.ptr)
        if queue.device.index != self.device_id:
            raise CUDARuntimeError(INVALID_HANDLE)  # cudaEventRecord: event and stream must be of one device
        self.recorded = self._machine.enqueue(queue, "event")

    def synchronize(self) -> None:
        """Runs what was recorded."""
        if self.recorded is not None:
            self._machine.synchronize([self.recorded])


def get_current_stream(device_id: int = -1) -> Any:
    """The thread's current stream of a device, by default the current one."""
    machine = active()
    device = get_device_id() if device_id == -1 else device_id
    return thread_streams(machine).get(device) or Stream.null


def current_ptr() -> int:
    """The handle of the current stream."""
    return int(get_current_stream().ptr)


def legacy_ptr() -> int:
    """The handle that DLPack calls the legacy default stream."""
    return LEGACY
