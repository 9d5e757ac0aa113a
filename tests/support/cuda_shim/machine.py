"""The machine behind the fake CuPy: devices with memory, and streams as queues that nothing runs by itself.

What is enqueued runs only when the host waits for something (or, on seeds that are `eager`, now and then at
an enqueue): the machine then picks the next operation at random among the heads of all queues, as far as
stream order and event edges allow, until what is waited for is done and a few more have run. A missing edge
is thus seen for some seed.
"""

from __future__ import annotations

import functools
import gc
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cuda_shim.device_memory import AddressSpace, Allocation, Budget
from cuda_shim.errors import (
    ILLEGAL_ADDRESS,
    INVALID_DEVICE,
    INVALID_HANDLE,
    CUDARuntimeError,
    Misuse,
    OutOfMemoryError,
)
from cuda_shim.program import KernelFault

__all__ = ["Device", "Machine", "Operation", "Queue", "active"]

# CUDA's handles of the default streams; any other stream of ours has a larger one.
NULL, LEGACY, PER_THREAD = 0, 1, 2


@dataclass(eq=False)
class Operation:
    """One entry of a queue; `after` holds it back until that other operation is done."""

    name: str
    queue: Queue
    run: Callable[[], None] | None = None
    after: Operation | None = None
    done: bool = False


@dataclass(eq=False)
class Queue:
    """A stream: its operations start in order, one at a time."""

    ptr: int
    device: Device
    waiting: deque[Operation] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether the first operation may run now."""
        return bool(self.waiting) and (self.waiting[0].after is None or self.waiting[0].after.done)


@dataclass(eq=False)
class Device:
    """One GPU: its memory, and the status all its calls fail with once it is lost."""

    index: int
    budget: Budget
    lost: int | None = None


class Machine:
    """Everything one installed fake CuPy shares: devices, queues, memory, the seed, and what went wrong.

    `eagerness` is the chance that an enqueue also runs some operations; by default two seeds of three have
    none. `resident` is the most blocks of a kernel that are alive at once.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        n_devices: int = 1,
        memory_bytes: int = 1 << 30,
        eagerness: float | None = None,
        resident: int = 4,
    ) -> None:
        self.random = random.Random(seed)
        self.eagerness = (0.0, 0.0, 0.3)[seed % 3] if eagerness is None else eagerness
        self.resident = resident
        self.lock = threading.RLock()
        self.devices = [Device(index, Budget(memory_bytes)) for index in range(n_devices)]
        self.queues: dict[int, Queue] = {}
        self.space = AddressSpace()
        self.local = threading.local()
        self.counts: Counter[str] = Counter()  # launches, compilations, allocations, … by name
        self.violations: list[str] = []
        self.launch_fault: LaunchFault | None = None
        self._next_ptr = 0x7000
        # Finalizers run anywhere, also inside the loops below: they only append here.
        self._released: list[Allocation] = []

    # -- devices
    # ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Device:
        """The calling thread's current device; raises CUDARuntimeError once it is lost."""
        return self.device(getattr(self.local, "device", 0))

    def device(self, index: int) -> Device:
        """A device by number; raises CUDARuntimeError if there is none or it is lost."""
        if not 0 <= index < len(self.devices):
            raise CUDARuntimeError(INVALID_DEVICE)
        found = self.devices[index]
        if found.lost is not None:
            raise CUDARuntimeError(found.lost)
        return found

    def lose(self, device: Device, status: int) -> None:
        """Makes every later call on the device fail; what waits in its queues never runs."""
        device.lost = status
        for queue in self.queues.values():
            if queue.device is device:
                for operation in queue.waiting:
                    operation.done = True
                queue.waiting.clear()

    # -- queues
    # ----------------------------------------------------------------------------------------------------

    def new_queue(self, device: Device) -> Queue:
        """A new stream of a device."""
        with self.lock:
            self._next_ptr += 0x10
            queue = self.queues[self._next_ptr] = Queue(self._next_ptr, device)
            return queue

    def queue(self, ptr: int) -> Queue:
        """The stream behind a handle.

        Raises:
            Misuse: a default stream: it waits for no non-blocking stream, and none waits for it.
            CUDARuntimeError: no such stream, or its device is lost.
        """
        if ptr in (NULL, LEGACY, PER_THREAD):
            raise self.violation(Misuse("work on a default stream: make a stream current, or name one"))
        if ptr not in self.queues:
            raise CUDARuntimeError(INVALID_HANDLE)
        self.device(self.queues[ptr].device.index)
        return self.queues[ptr]

    def enqueue(self, queue: Queue, name: str, run: Callable[[], None] | None = None) -> Operation:
        """Appends an operation; `run` is called when its turn comes, on whichever thread makes it."""
        return self._append(Operation(name, queue, run))

    def wait(self, queue: Queue, operation: Operation | None) -> None:
        """Holds back what is enqueued from now on until `operation` is done (None: nothing to wait for)."""
        if operation is not None and not operation.done:
            self._append(Operation("wait", queue, None, operation))

    def _append(self, operation: Operation) -> Operation:
        with self.lock:
            self.collect()
            self.device(operation.queue.device.index)
            operation.queue.waiting.append(operation)
            if self.eagerness and self.random.random() < self.eagerness:
                self.wander(8)
            return operation

    # -- running
    # ---------------------------------------------------------------------------------------------------

    def synchronize(self, targets: Iterable[Operation]) -> None:
        """Runs until all targets are done, and then a few operations more.

        Raises:
            CUDARuntimeError: a device that they are on is lost.
            KernelFault: a kernel did what none may (see `violations`); its device is lost from then on.
        """
        with self.lock:
            self.collect()
            targets = list(targets)
            # 0: only what must run; 1: whatever comes; 2: others first, as long as there are any.
            mood = self.random.choice((0, 1, 2))
            while not all(target.done for target in targets):
                needed = [queue for queue in self._needed(targets) if queue.ready]
                others = [queue for queue in self.queues.values() if queue.ready and queue not in needed]
                if not needed and not others:
                    raise self.violation(Misuse("the host waits for what can never run"))
                choice = others if others and (mood == 2 and self.random.random() < 0.9) else needed
                if mood == 1 or not choice:
                    choice = needed + others
                self._run_head(self.random.choice(choice))
            for target in targets:
                self.device(target.queue.device.index)
            self.wander(4)

    def synchronize_queue(self, queue: Queue) -> None:
        """Runs until the queue is empty."""
        with self.lock:
            self.synchronize([queue.waiting[-1]] if queue.waiting else [])
            self.device(queue.device.index)

    def wander(self, most: int) -> None:
        """Runs up to `most` operations, whichever."""
        with self.lock:
            for _ in range(self.random.randrange(most + 1)):
                ready = [queue for queue in self.queues.values() if queue.ready]
                if not ready:
                    return
                self._run_head(self.random.choice(ready))

    def drain(self) -> None:
        """Runs everything that is left."""
        with self.lock:
            self.collect()
            while ready := [queue for queue in self.queues.values() if queue.ready]:
                self._run_head(self.random.choice(ready))

    def _needed(self, targets: Iterable[Operation]) -> list[Queue]:
        """The queues whose heads have to run before the targets are done."""
        left = [target for target in targets if not target.done]
        seen: set[int] = set()
        queues: dict[int, Queue] = {}
        while left:
            target = left.pop()
            if id(target) in seen:
                continue
            seen.add(id(target))
            queues[target.queue.ptr] = target.queue
            for operation in target.queue.waiting:
                if operation.after is not None and not operation.after.done:
                    left.append(operation.after)
                if operation is target:
                    break
        return list(queues.values())

    def _run_head(self, queue: Queue) -> None:
        operation = queue.waiting.popleft()
        operation.done = True
        if operation.run is None:
            return
        try:
            operation.run()
        except KernelFault as fault:
            self.lose(queue.device, ILLEGAL_ADDRESS)
            raise self.violation(fault) from None
        except Misuse as misuse:
            raise self.violation(misuse) from None

    def violation(self, error: AssertionError) -> AssertionError:
        """Notes a wrong that fails the test even if someone swallows the exception; to be raised."""
        if str(error) not in self.violations:
            self.violations.append(str(error))
        return error

    # -- memory
    # ----------------------------------------------------------------------------------------------------

    def allocate(self, device: Device, nbytes: int, stream_ptr: int) -> Allocation:
        """Device memory, given back in the order of the stream it was taken for, as CuPy's pool does.

        Raises:
            OutOfMemoryError: beyond the device's budget.
        """
        with self.lock:
            self.collect()
            self.device(device.index)
            try:
                device.budget.take(nbytes)
            except OutOfMemoryError:
                gc.collect()  # as CuPy does before it gives up
                self.collect()
                device.budget.take(nbytes)
            allocation = Allocation(device.index, nbytes, stream_ptr, self._poison(), self._released)
            self.space.add(allocation)
            self.counts["allocations"] += 1
            return allocation

    def allocate_pinned(self, nbytes: int) -> Allocation:
        """Host memory that copies and kernels reach in their turn; closed as soon as nothing refers to it."""
        with self.lock:
            self.collect()
            allocation = Allocation(None, nbytes, NULL, self._poison(), self._released)
            self.space.add(allocation)
            self.counts["pinned allocations"] += 1
            return allocation

    def collect(self) -> None:
        """Enqueues the release of the memory that nothing refers to any more."""
        while self._released:
            allocation = self._released.pop(0)
            if allocation.device is not None:
                self.devices[allocation.device].budget.give_back(allocation.nbytes)
            queue = self.queues.get(allocation.stream_ptr)
            if queue is None or queue.device.lost is not None or not queue.waiting:
                self._close(allocation)
            else:
                # The pool may hand it to the next one on this stream at once, and to nobody else: work of
                # other streams that still uses it must have been waited for.
                queue.waiting.append(Operation("free", queue, functools.partial(self._close, allocation)))

    def close(self) -> None:
        """Takes back all memory, whoever still refers to it."""
        for allocation in self.space.live():
            self.space.remove(allocation)
            try:
                allocation.close()
            except KernelFault as fault:
                self.violation(fault)

    def _close(self, allocation: Allocation) -> None:
        self.space.remove(allocation)
        try:
            allocation.close()
        except KernelFault as fault:
            raise self.violation(fault) from None

    def _poison(self) -> int:
        # As 32-bit integers: a large negative and two large positive ones; as float32: tiny, huge and in
        # between.
        return self.random.choice((0xA5, 0x7E, 0x5B))


@dataclass
class LaunchFault:
    """After `skip` more launches, one fails: at the call itself, or (`late`) when the kernel would run."""

    status: int
    skip: int
    late: bool


_installed: list[Machine] = []


def active() -> Machine:
    """The machine of the installed fake CuPy."""
    if not _installed:
        raise Misuse("the fake CuPy is used after its test")
    return _installed[-1]


def activate(machine: Machine) -> None:
    """Makes a machine the active one."""
    _installed.append(machine)


def deactivate(machine: Machine) -> None:
    """Ends a machine's time."""
    _installed.remove(machine)


def thread_streams(machine: Machine) -> dict[int, Any]:
    """The calling thread's current stream of each device."""
    streams: dict[int, Any] = getattr(machine.local, "streams", {})
    machine.local.streams = streams
    return streams
