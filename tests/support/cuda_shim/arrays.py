"""`cupy.ndarray` and what makes it, as far as our code uses them (cupy/_core/core.pyx, version 14).

Stricter than CuPy: what CuPy would do with a hidden kernel (arithmetic, copying non-contiguous arrays,
indexing by arrays) is refused, since our engine launches only kernels of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_shim import copies, dlpack
from cuda_shim.errors import Misuse
from cuda_shim.machine import NULL, active
from cuda_shim.pool import BaseMemory, MemoryPointer, alloc
from cuda_shim.streams import Device, current_ptr, get_current_stream, legacy_ptr

Shape = tuple[int, ...]


class Flags:
    """Of an array; all arrays here are C-contiguous or refused."""

    def __init__(self, c_contiguous: bool, f_contiguous: bool, owndata: bool) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = c_contiguous, f_contiguous, owndata


class ndarray:
    """An array on a device. The host sees its elements by `get` only."""

    __array_ufunc__ = None
    __array_priority__ = 100

    def __init__(
        self,
        shape: int | Shape,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: Shape | None = None,
        order: str = "C",
    ) -> None:
        if strides is not None or order != "C":
            raise Misuse("the shim's arrays are C-contiguous")
        self.shape: Shape = (shape,) if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)
        if any(n < 0 for n in self.shape):
            raise ValueError("Negative dimensions are not allowed")
        self.dtype = np.dtype(dtype)
        self.data = alloc(self.nbytes) if memptr is None else memptr
        self.base: ndarray | None = None

    @property
    def ndim(self) -> int:
        """Of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def itemsize(self) -> int:
        """Of one element, bytes."""
        return int(self.dtype.itemsize)

    @property
    def device(self) -> Device:
        """Where it is."""
        return Device(self.data.device_id)

    @property
    def nbytes(self) -> int:
        """Of all elements."""
        return self.size * self.itemsize

    @property
    def strides(self) -> Shape:
        """Bytes from one element to the next along each axis."""
        rest = [int(np.prod(self.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(self.shape))]
        return tuple(n * self.dtype.itemsize for n in rest)

    @property
    def flags(self) -> Flags:
        """Contiguity and ownership."""
        return Flags(True, sum(n > 1 for n in self.shape) <= 1, self.base is None)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<device array {self.dtype} {self.shape} at {self.data.ptr:#x}>"

    def __bool__(self) -> bool:
        raise Misuse("the truth of a device array needs a copy to the host: use get()")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed."
            " Please use `.get()` to construct a NumPy array explicitly."
        )

    def __iter__(self) -> Any:
        raise Misuse("iterating over a device array")

    # -- views
    # -----------------------------------------------------------------------------------------------------

    def _view(self, shape: Shape, dtype: Any, offset: int) -> ndarray:
        view = ndarray(shape, dtype, self.data + offset if self.data.ptr else self.data)
        view.base = self if self.base is None else self.base
        return view

    def reshape(self, *shape: Any) -> ndarray:
        """A view of another shape; one axis may be -1."""
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return self._view(np.empty(self.shape, np.bool_).reshape(wanted).shape, self.dtype, 0)

    def ravel(self) -> ndarray:
        """A view of one axis."""
        return self.reshape(-1)

    def view(self, dtype: Any = None) -> ndarray:
        """The same bytes as another type; the last axis changes where the width does."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        last = (self.shape[-1] if self.shape else 1) * self.dtype.itemsize
        if last % dtype.itemsize or (not self.shape and dtype.itemsize != self.dtype.itemsize):
            raise ValueError("the last axis does not divide into elements of that size")
        return self._view((*self.shape[:-1], last // dtype.itemsize) if self.shape else (), dtype, 0)

    def __getitem__(self, key: Any) -> ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        if not all(k is Ellipsis or isinstance(k, int | np.integer | slice) for k in keys):
            raise Misuse(f"indexing a device array by {key!r} would launch a kernel of CuPy's")
        # NumPy works out the part on an array without memory of its own.
        model = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        part = model[keys]
        if not part.flags.c_contiguous:
            raise Misuse(f"[{key!r}] of {self!r} is not contiguous")
        offset = part.__array_interface__["data"][0] - model.__array_interface__["data"][0]
        return self._view(part.shape, self.dtype, offset if part.size else 0)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise Misuse("assigning to a device array would launch a kernel of CuPy's: use set() or a kernel")

    # -- copies
    # ----------------------------------------------------------------------------------------------------

    def get(
        self, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        """A copy on the host; with `blocking=False` and a pinned `out`, once the stream gets there."""
        stream = get_current_stream() if stream is None else stream
        if out is not None:
            if not isinstance(out, np.ndarray):
                raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
            if self.dtype != out.dtype:
                raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
            if self.shape != out.shape:
                raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
            if not out.flags.c_contiguous:
                raise Misuse("get(out=) into an array that is not C-contiguous")
        else:
            out = np.empty(self.shape, self.dtype)
        machine = active()
        queue = machine.queue(stream.ptr)
        copies.copy(machine, out.ctypes.data, self.data.ptr, self.nbytes, copies.DEVICE_TO_HOST, queue)
        if blocking:
            stream.synchronize()
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        """Copies from the host; a pinned source is read only when the stream gets there."""
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        arr = np.ascontiguousarray(arr)
        stream = get_current_stream() if stream is None else stream
        machine = active()
        queue = machine.queue(stream.ptr)
        copies.copy(machine, self.data.ptr, arr.ctypes.data, self.nbytes, copies.HOST_TO_DEVICE, queue)

    # -- DLPack
    # ----------------------------------------------------------------------------------------------------

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.data.device_id

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule; the consumer's stream waits for CuPy's *current* stream, unless it is -1."""
        machine = active()
        if dl_device not in (None, self.__dlpack_device__()) or copy:
            raise BufferError("unsupported device or copy requested")
        if stream is None:
            stream = legacy_ptr()
        elif not isinstance(stream, int) or stream < -1:
            raise ValueError(
                f"On CUDA, the valid stream for the DLPack protocol is -1, 1, 2, …, but {stream} was provided"
            )
        current = current_ptr()
        if stream >= 0 and stream != current:
            producer = machine.queue(current)  # refuses the null stream, which no stream of ours waits for
            consumer = machine.queue(stream)
            machine.wait(consumer, machine.enqueue(producer, "event"))
        versioned = max_version is not None and max_version[0] >= 1
        device = self.__dlpack_device__()
        return dlpack.export(self.data.ptr, self.shape, self.dtype, device, self, versioned=versioned)


class _Taken:
    """Keeps a capsule's memory until CuPy's array over it goes."""

    def __init__(self, taken: dlpack.Imported) -> None:
        self._taken = taken

    def __del__(self) -> None:
        self._taken.release()


def from_dlpack(array: Any, *, device: Any = None, copy: bool | None = None) -> ndarray:
    """An array over another library's; its owner orders CuPy's *current* stream of that device after it.

    A bare capsule comes with no order at all.
    """
    if device is not None:
        raise NotImplementedError("from_dlpack() does not support device yet.")
    capsule = array
    if hasattr(array, "__dlpack_device__"):
        kind, index = array.__dlpack_device__()
        if kind != dlpack.CUDA:
            raise TypeError(f"CPU arrays cannot be directly imported to CuPy (device type {kind})")
        with Device(index):
            stream = current_ptr()
        if stream == NULL:
            raise active().violation(
                Misuse("from_dlpack while the default stream is current: nothing orders ours")
            )
        try:
            capsule = array.__dlpack__(stream=stream, max_version=(1, 0), copy=copy)
        except TypeError:
            if copy is not None:
                raise
            capsule = array.__dlpack__(stream=stream)
    taken = dlpack.take(capsule)
    if taken.device[0] != dlpack.CUDA:
        raise RuntimeError(
            "CuPy is built against CUDA, different from the backend that backs the incoming tensor"
        )
    nbytes = int(np.prod(taken.shape, dtype=np.int64)) * taken.dtype.itemsize
    memory = BaseMemory(taken.address, nbytes, taken.device[1], _Taken(taken))
    return ndarray(taken.shape, taken.dtype, MemoryPointer(memory, 0))


def empty(shape: int | Shape, dtype: Any = float, order: str = "C") -> ndarray:
    """Uninitialised: poisoned."""
    return ndarray(shape, dtype, order=order)


def zeros(shape: int | Shape, dtype: Any = float, order: str = "C") -> ndarray:
    """Zeroed on the current stream."""
    array = ndarray(shape, dtype, order=order)
    machine = active()
    if array.nbytes:
        copies.fill(machine, array.data.ptr, 0, array.nbytes, machine.queue(current_ptr()))
    return array


def asarray(a: Any, dtype: Any = None) -> ndarray:
    """A device array as it is, or a copy of a host array made on the current stream."""
    if isinstance(a, ndarray):
        if dtype not in (None, a.dtype):
            raise Misuse("converting a device array would launch a kernel of CuPy's")
        return a
    host = np.ascontiguousarray(a, dtype)
    array = ndarray(host.shape, host.dtype)
    array.set(host)
    return array


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: np.ndarray | None = None, *, blocking: bool = True
) -> np.ndarray:
    """`get` of a device array; anything else as NumPy does."""
    if isinstance(a, ndarray):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(a)
