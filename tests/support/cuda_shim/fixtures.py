"""Installs the fake CuPy for a test and takes it away afterwards.

In a conftest: `from cuda_shim.fixtures import fake_cupy`. A test names a seed, or options of
Machine, by `@pytest.mark.parametrize("fake_cupy", [0, 1, {"seed": 2, "n_devices": 2}], indirect=True)`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda_shim import arrays, errors, pool, raw_module, runtime_api, streams
from cuda_shim.machine import LaunchFault, Machine, activate, deactivate
from cuda_shim.program import host_view

# Whatever has bound CuPy's names must be imported anew for every fake, and for the real one afterwards.
_BOUND = ("cupy", "cupy_backends", "nann.engine.cuda")


@dataclass(frozen=True)
class FakeCupy:
    """An installed fake: `cupy` is the module, `machine` what is behind it."""

    cupy: Any
    machine: Machine

    def peek(self, array: Any) -> np.ndarray:
        """A copy of a device array's memory as it is now, without running anything."""
        return host_view(array.data.ptr, array.shape, array.dtype).copy()

    @contextmanager
    def expect_violation(self, words: str) -> Iterator[None]:
        """The block must do what no GPU forgives, and be told so in these words; the test then goes on."""
        known = list(self.machine.violations)
        try:
            yield
        except AssertionError as error:
            assert words in str(error), str(error)
        assert any(words in text for text in self.machine.violations if text not in known), (
            "no such violation"
        )
        self.machine.violations[:] = known

    def fail_launch(self, *, skip: int = 0, late: bool = False, status: int = errors.LAUNCH_FAILED) -> None:
        """After `skip` more launches one fails, and every later call on its device, until `reset`.

        `late`: the launch itself succeeds, and the failure shows where the host next waits.
        """
        self.machine.launch_fault = LaunchFault(status, skip, late)

    def lose_device(self, device: int = 0, status: int = errors.LAUNCH_FAILED) -> None:
        """Every later call on the device fails, until `reset`."""
        self.machine.lose(self.machine.devices[device], status)

    def reset(self, device: int = 0) -> None:
        """The device works again (a real one needs a new process)."""
        self.machine.devices[device].lost = None

    def refuse_allocations_over(self, nbytes: int | None, device: int = 0) -> None:
        """Any larger allocation raises OutOfMemoryError; None: none is refused for its size."""
        self.machine.devices[device].budget.largest = nbytes

    def occupy(self, nbytes: int, device: int = 0) -> None:
        """So much of the device's memory is somebody else's."""
        self.machine.devices[device].budget.outside = nbytes

    def count(self, what: str) -> int:
        """How many so far.

        Of `launches`, `launch NAME`, `copies`, `fills`, `allocations`, `pinned allocations`,
        `compilations`, `streams` or `events`.
        """
        return self.machine.counts[what]


@contextmanager
def installed(seed: int = 0, **options: Any) -> Iterator[FakeCupy]:
    """The fake CuPy in `sys.modules` inside the block; `options` are Machine's.

    In the end everything left is run, and the block fails if anything was done that a GPU would not forgive.
    """
    machine = Machine(seed, **options)
    before = {name: module for name, module in sys.modules.items() if _bound(name)}
    _forget()
    cupy = _modules()
    activate(machine)
    fake = FakeCupy(cupy, machine)
    failed = True
    try:
        yield fake
        failed = False
    finally:
        try:
            if not failed:
                machine.drain()
        finally:
            deactivate(machine)
            _forget()
            for name, module in before.items():
                _bind(name, module)
            machine.close()
        if not failed and machine.violations:
            raise AssertionError("; ".join(machine.violations))


@pytest.fixture
def fake_cupy(request: pytest.FixtureRequest) -> Iterator[FakeCupy]:
    """The fake CuPy for one test; the parameter is a seed or Machine's options."""
    parameter = getattr(request, "param", 0)
    options = dict(parameter) if isinstance(parameter, dict) else {"seed": parameter}
    with installed(**options) as fake:
        yield fake


def _bound(name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in _BOUND)


def _bind(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _forget() -> None:
    for name in [name for name in sys.modules if _bound(name)]:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and hasattr(sys.modules[parent], child):
            delattr(sys.modules[parent], child)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    module.__path__ = []
    _bind(name, module)
    return module


def _modules() -> ModuleType:
    cupy = _module(
        "cupy",
        __version__="14.2.0",
        ndarray=arrays.ndarray,
        empty=arrays.empty,
        zeros=arrays.zeros,
        asarray=arrays.asarray,
        array=arrays.asarray,
        asnumpy=arrays.asnumpy,
        from_dlpack=arrays.from_dlpack,
        get_default_memory_pool=pool.get_default_memory_pool,
        RawModule=raw_module.RawModule,
        **{
            name: getattr(np, name)
            for name in ("bool_", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
        },
        **{name: getattr(np, name) for name in ("float16", "float32", "float64", "dtype")},
    )
    _module(
        "cupy.cuda",
        Device=streams.Device,
        Stream=streams.Stream,
        ExternalStream=streams.ExternalStream,
        Event=streams.Event,
        get_current_stream=streams.get_current_stream,
        get_device_id=streams.get_device_id,
        MemoryPointer=pool.MemoryPointer,
        BaseMemory=pool.BaseMemory,
        UnownedMemory=pool.UnownedMemory,
        alloc=pool.alloc,
        alloc_pinned_memory=pool.alloc_pinned_memory,
        is_available=lambda: runtime_api.getDeviceCount() > 0,
    )
    _module("cupy.cuda.runtime", **{name: getattr(runtime_api, name) for name in runtime_api.__all__})
    _module("cupy.cuda.driver", CUDADriverError=errors.CUDADriverError)
    _module(
        "cupy.cuda.memory",
        OutOfMemoryError=errors.OutOfMemoryError,
        MemoryPointer=pool.MemoryPointer,
        UnownedMemory=pool.UnownedMemory,
        BaseMemory=pool.BaseMemory,
    )
    _module("cupy.cuda.compiler", CompileException=errors.CompileException)
    _module("cupy.cuda.stream", Stream=streams.Stream, Event=streams.Event)
    _module("cupy.cuda.device", Device=streams.Device)
    _module("cupy.cuda.pinned_memory", alloc_pinned_memory=pool.alloc_pinned_memory)
    return cupy
