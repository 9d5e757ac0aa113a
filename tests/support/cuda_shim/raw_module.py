"""`cupy.RawModule` and its kernels: compiled by the shim, run in a stream's order (raw.pyx, version 14)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_shim.arrays import ndarray
from cuda_shim.build import CompilationFailed
from cuda_shim.errors import (
    INVALID_HANDLE,
    INVALID_VALUE,
    CompileException,
    CUDADriverError,
    CUDARuntimeError,
    Misuse,
)
from cuda_shim.machine import Device, LaunchFault, Machine, Queue, active
from cuda_shim.pool import MemoryPointer
from cuda_shim.program import DEFAULT_SHARED_BYTES, BadLaunch, Kernel, Program, compile_program
from cuda_shim.source import Parameter, UnreadableSource
from cuda_shim.streams import current_ptr

__all__ = ["RawKernel", "RawModule"]

# CUDA C++ Programming Guide: the most a block may opt in to on compute capability 9.0.
_MOST_SHARED_BYTES = 227 * 1024


class RawModule:
    """Device code as text; compiled when a function is first got, and once more on every further device."""

    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | None = None,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Any = None,
        jitify: bool = False,
    ) -> None:
        if code is None or path is not None:
            raise TypeError("the shim compiles `code` only")
        if not isinstance(options, tuple) or not all(isinstance(option, str) for option in options):
            raise TypeError("Argument 'options' has incorrect type (expected tuple of str)")
        if (
            backend != "nvrtc"
            or translate_cucomplex
            or enable_cooperative_groups
            or name_expressions
            or jitify
        ):
            raise Misuse("the shim knows plain NVRTC modules only")
        self.code, self.options = code, options
        self._machine = active()
        self._programs: dict[int, Program] = {}

    def program(self) -> Program:
        """The program of the current device, compiled now if it was not before."""
        device = self._machine.current.index
        if device not in self._programs:
            self._machine.counts["compilations"] += 1
            try:
                self._programs[device] = compile_program(self.code, self.options)
            except (CompilationFailed, UnreadableSource) as error:
                raise CompileException(str(error), self.code, "kernel.cu", self.options) from None
        return self._programs[device]

    def compile(self, log_stream: Any = None) -> None:
        """Compiles for the current device."""
        self.program()

    def get_function(self, name: str) -> RawKernel:
        """A kernel by name; raises CUDADriverError (not found) if there is none."""
        if name not in self.program().kernels:
            raise CUDADriverError(500)  # CUDA_ERROR_NOT_FOUND
        return RawKernel(self, name)


class RawKernel:
    """One kernel of a module, on whichever device is current."""

    def __init__(self, module: RawModule, name: str) -> None:
        self._module, self.name = module, name
        self._machine = active()
        self._most_shared: dict[int, int] = {}

    @property
    def _kernel(self) -> Kernel:
        return self._module.program()[self.name]

    @property
    def max_threads_per_block(self) -> int:
        """Of `__launch_bounds__`, or 1024."""
        return self._kernel.max_threads

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """On the current device, as cuFuncSetAttribute sets it."""
        return self._most_shared.get(self._machine.current.index, DEFAULT_SHARED_BYTES)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        if not 0 <= nbytes <= _MOST_SHARED_BYTES:
            raise CUDADriverError(INVALID_VALUE)
        self._most_shared[self._machine.current.index] = nbytes

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        """Enqueues the kernel.

        Raises:
            CUDADriverError: sizes that a GPU refuses, a stream of another device, or a lost device. Misuse:
            arguments that do not fit the parameters; an empty grid, which CuPy would make one block of.
        """
        machine = self._machine
        with machine.lock:
            machine.collect()
            queue = self._queue_of(stream)
            kernel = self._kernel
            if not isinstance(grid, tuple) or not isinstance(block, tuple):
                raise TypeError("Argument 'grid' or 'block' has incorrect type (expected tuple)")
            if any(n < 1 for n in (*grid, *block)):
                raise machine.violation(Misuse(f"{self.name}: an empty grid or block: {grid}, {block}"))
            try:
                kernel.check_sizes(grid, block, shared_mem, self.max_dynamic_shared_size_bytes)
            except BadLaunch as error:
                raise CUDADriverError(INVALID_VALUE) from error
            try:
                kernel.check_count(args)
                pairs = zip(kernel.signature.parameters, args, strict=True)
                values = [self._value(kernel, queue.device, parameter, value) for parameter, value in pairs]
            except BadLaunch as error:
                raise machine.violation(Misuse(str(error))) from error
            machine.counts["launches"] += 1
            machine.counts[f"launch {self.name}"] += 1
            fault = _due(machine)
            if fault is not None and not fault.late:
                machine.lose(queue.device, fault.status)
                raise CUDADriverError(fault.status)
            seed = machine.random.getrandbits(63)

            def run() -> None:
                if fault is not None:
                    machine.lose(queue.device, fault.status)
                    return
                kernel.launch(
                    grid, block, values, shared_bytes=shared_mem, seed=seed, resident=machine.resident
                )

            machine.enqueue(queue, self.name, run)

    def _queue_of(self, stream: Any) -> Queue:
        try:
            queue = self._machine.queue(current_ptr() if stream is None else stream.ptr)
            current = self._machine.current
        except CUDARuntimeError as error:
            raise CUDADriverError(error.status) from None
        if queue.device is not current:
            raise CUDADriverError(
                INVALID_HANDLE
            )  # the function belongs to the current device, the stream to another
        return queue

    def _value(self, kernel: Kernel, device: Device, parameter: Parameter, value: Any) -> np.generic:
        if not parameter.pointer:
            return kernel.check_scalar(parameter, value)
        where = f"{self.name}({parameter.c_type} {parameter.name})"
        dtype = None
        if isinstance(value, ndarray):
            address, dtype = value.data.ptr, value.dtype
        elif isinstance(value, MemoryPointer):
            address = value.ptr
        elif isinstance(value, np.generic) and value.dtype.kind in "iu" and value.dtype.itemsize == 8:
            address = int(value)
        else:
            raise BadLaunch(
                f"{where}: give a device array, or an address as np.uint64; not {type(value).__name__}"
            )
        if address:
            found = self._machine.space.find(address)
            if found is None:
                raise BadLaunch(f"{where}: an address in no live memory")
            if found.device not in (None, device.index):
                raise BadLaunch(
                    f"{where}: memory of device {found.device} in a kernel of device {device.index}"
                )
        return kernel.check_pointer(parameter, address, dtype)


def _due(machine: Machine) -> LaunchFault | None:
    fault = machine.launch_fault
    if fault is None:
        return None
    if fault.skip:
        fault.skip -= 1
        return None
    machine.launch_fault = None
    return fault
