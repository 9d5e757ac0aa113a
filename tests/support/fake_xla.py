"""XLA on a GPU as JAX runs it, over the streams of the fake machine: what `cuda.handover` relies on, no more.

One compute stream a device, on which all programs run in the order they were called; a few streams for the
events of outsiders; arrays with a definition event. Memory of outputs goes back in the order of the compute
stream, whoever else still uses it. Nothing is copied: programs read memory when their turn comes, in two
halves, and write as they go.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from cuda_shim import dlpack
from cuda_shim.errors import Misuse
from cuda_shim.fixtures import installed
from cuda_shim.machine import Machine, Operation
from cuda_shim.program import host_view

__all__ = ["FakeXla", "XlaArray", "fake_gpu", "score_by_rows", "score_crossed"]

# As JAX has it: kNumExternalReadyEventStreams in XLA's local_device_state.cc.
_READY_STREAMS = 4
Function = Callable[..., np.ndarray]


@dataclass(eq=False)
class XlaArray:
    """What stands for a `jax.Array` on a GPU. ``owner`` goes with it, or with the last capsule of it."""

    xla: FakeXla
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    definition: Operation
    owner: Any

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """The memory, for an operation whose turn has come."""
        if self.xla.machine.space.find(self.address, max(self.nbytes, 1)) is None:
            raise self.xla.machine.violation(Misuse(f"a program reads freed memory at {self.address:#x}"))
        return host_view(self.address, self.shape, self.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CUDA, self.xla.device)

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """-1 orders nothing, None makes the host wait, any other stream waits for the definition event."""
        if stream is None:
            self.xla.machine.synchronize([self.definition])
        elif stream != -1:
            self.xla.machine.wait(self.xla.machine.queue(stream), self.definition)
        return dlpack.export(self.address, self.shape, self.dtype, self.__dlpack_device__(), self.owner)


class FakeXla:
    """The client of one device; `from_dlpack` and `run` are JAX's two ways in."""

    def __init__(self, machine: Machine, device: int = 0) -> None:
        self.machine = machine
        self.device = device
        self.compute = machine.new_queue(machine.device(device))
        self._ready = itertools.cycle(
            [machine.new_queue(machine.device(device)) for _ in range(_READY_STREAMS)]
        )
        self.imported = 0

    def from_dlpack(self, array: Any, *, device: Any = None, copy: bool | None = None) -> XlaArray:
        """`jax.dlpack.from_dlpack` of an array of CuPy's on this device."""
        assert device is None
        assert copy is False, "a copy would be read at a time that nobody orders"
        queue = next(self._ready)
        imported = dlpack.take(array.__dlpack__(stream=queue.ptr))
        assert imported.device == (dlpack.CUDA, self.device)
        self.imported += 1
        definition = self.machine.enqueue(queue, "definition")
        owner = _Release(imported.release)
        return XlaArray(self, imported.address, imported.shape, imported.dtype, definition, owner)

    def put(self, array: np.ndarray) -> XlaArray:
        """`jax.device_put` of an array of the host."""
        address, owner = self._allocate(array.nbytes)
        kept = array.copy()
        placed = XlaArray(self, address, array.shape, array.dtype, Operation("unset", self.compute), owner)
        placed.definition = self.machine.enqueue(self.compute, "put", lambda: _write(placed, kept))
        return placed

    def run(self, function: Function, shape: tuple[int, ...], *arguments: XlaArray) -> XlaArray:
        """Enqueue ``function(half, *views)`` -> those rows of the output, for the first and the second half.

        The memory of the arguments is not held: who calls must.
        """
        with self.machine.lock:
            return self._run(function, shape, arguments)

    def _run(self, function: Function, shape: tuple[int, ...], arguments: Sequence[XlaArray]) -> XlaArray:
        for argument in arguments:
            self.machine.wait(self.compute, argument.definition)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * 4
        address, owner = self._allocate(n_bytes)
        output = XlaArray(self, address, shape, np.dtype(np.float32), Operation("unset", self.compute), owner)
        plain = [_Plain(argument) for argument in arguments]
        address_only = _Plain(output)
        middle = -(-shape[0] // 2)
        for half in (slice(0, middle), slice(middle, shape[0])):

            def part(half: slice = half) -> None:
                address_only.view()[half] = function(half, *(argument.view() for argument in plain))

            output.definition = self.machine.enqueue(self.compute, "program", part)
        return output

    def _allocate(self, n_bytes: int) -> tuple[int, Any]:
        allocation = self.machine.allocate(self.machine.device(self.device), n_bytes, self.compute.ptr)
        return allocation.address, allocation.handle()


@contextmanager
def fake_gpu(seed: int, **options: Any) -> Iterator[tuple[Any, Machine, FakeXla]]:
    """The fake CuPy, its machine, and a fake XLA behind `jax.dlpack`, for the block.

    Raises AssertionError at its end if something was done that no GPU forgives (`fixtures.installed`).
    """
    import jax.dlpack

    with installed(seed, **options) as fake:
        xla = FakeXla(fake.machine)
        with mock.patch.object(jax.dlpack, "from_dlpack", xla.from_dlpack):
            yield fake.cupy, fake.machine, xla


class _Plain:
    """An array's place in memory without its owner: an enqueued program keeps nothing alive."""

    def __init__(self, array: XlaArray) -> None:
        self._bare = XlaArray(array.xla, array.address, array.shape, array.dtype, array.definition, None)
        self.view = self._bare.view


class _Release:
    """Calls what it was given when it goes."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def __del__(self) -> None:
        self._release()


def _write(array: XlaArray, values: np.ndarray) -> None:
    array.view()[...] = values


def score_by_rows(half: slice, tile_query: np.ndarray, items: np.ndarray, users: np.ndarray) -> np.ndarray:
    """user · item of the tiles in `half`; users float32 [batch, dim], items float16 [tiles, rows, dim]."""
    with np.errstate(all="ignore"):  # poisoned memory may hold anything
        vectors = items[half].astype(np.float32)
        return np.einsum("td,trd->tr", users[np.clip(tile_query[half], 0, len(users) - 1)], vectors)


def score_crossed(half: slice, items: np.ndarray, users: np.ndarray) -> np.ndarray:
    """user · item of the users in `half`; users float32 [batch, dim], items float16 [1, rows, dim]."""
    with np.errstate(all="ignore"):
        return users[half] @ items[0].astype(np.float32).T
