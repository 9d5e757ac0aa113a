"""All order between the stream of a lane and the streams of XLA (docs/adr/0008-stream-ordering.md).

A lane writes and reads with CuPy on one non-blocking stream; XLA runs programs on a compute stream of its
own, one a device, shared by all lanes. Nothing orders the two but what is made here:

1. *lane → XLA*, before a program reads what the lane wrote: `lend`.
2. *XLA → lane*, before the lane reads the scores, and before it overwrites what the program read: `take`.
3. *lane → XLA*, before XLA gives the memory of the scores to a later program: `take` and `lend` together
   keep them alive until a later program has been ordered after the lane's reading of them.

**JAX.** ``jax.dlpack.from_dlpack(array)`` calls ``array.__dlpack__(stream=s)`` with one of XLA's streams for
outside events; CuPy records an event on its *current* stream and makes s wait for it; XLA records the
array's definition event on s. A program waits on the compute stream for the definition events of all its
arguments. The other way, ``cupy.from_dlpack`` passes CuPy's current stream to ``__dlpack__`` of the output,
and XLA makes it wait for the definition event of that output, which is recorded after the whole program
was enqueued. So the lane's stream must be current (and its device: CuPy refuses it otherwise) around both.

*Only the first array of a call is lent anew; the views of the others are made once and used again.* That
is sound because (a) one event suffices: it is recorded after everything the lane has enqueued, and the
compute stream, in whose order all parts of the program run, waits for it, whichever argument carries it;
(b) the definition events of old views are past, so they neither order nor delay anything; (c) XLA reads an
argument only while its program runs, and may assume it constant only for that long: the lane overwrites it
after `take` made its stream wait for the end of the program; nothing here reads a view on the host, where
JAX would cache what it saw; (d) no argument is donated; (e) a view keeps its memory alive, so an address
names the same memory as long as the view exists. Weights are used by every call for the life of a process
in the same way. It saves a call of Python, a CUDA event and two event waits for each item tensor of a step.

**TensorFlow.** Its ``from_dlpack`` orders nothing and its ``__dlpack__`` takes no stream, so the host waits:
for the lane's stream before lending, and for TensorFlow's device inside ``to_dlpack``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nann.engine.cuda.errors import device_errors
from nann.engine.errors import BackendError

__all__ = ["JaxHandover", "TensorFlowHandover", "device_id"]

# What XLA's GPU kernels may assume of the address of an argument (kEntryParameterAlignBytes in XLA).
_ALIGNMENT_BYTES = 16
# JAX would narrow 64-bit arrays, by a copy that nothing here orders.
_DTYPES = frozenset({"float16", "float32", "int32", "uint32", "int16", "uint16", "int8", "uint8"})
# A lane lends the tiles of each compiled shape and the chunks of a scan of all items: a few hundred views
# of a table of millions. Old views beyond that are of scratch memory that has since been replaced.
_MOST_VIEWS = 4096


class JaxHandover:
    """Hands arrays between one lane's stream and XLA as JAX (PJRT) runs it; a lane is one thread at a time.

    Calls come in pairs: `lend` all arrays of a program, run it, `take` its scores. A call that fails in
    between needs no clearing up.
    """

    def __init__(self, stream: Any) -> None:
        import cupy
        import jax.dlpack
        from jax.errors import JaxRuntimeError

        self._cupy = cupy
        self._from_dlpack = jax.dlpack.from_dlpack
        self._xla_error = JaxRuntimeError
        self._stream = stream
        self._device = cupy.cuda.Device(stream.device_id)
        self._views: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._lent: tuple[Any, ...] = ()
        self._taken: list[Any] = []
        self._read: list[Any] = []

    def lend(self, first: Any, *others: Any) -> tuple[Any, ...]:
        """JAX arrays over the memory of CuPy arrays: all that one call of a program reads, together.

        The program runs after everything enqueued on the lane's stream so far. ``first`` is lent anew
        and carries that order, so let it be the smallest.

        Raises:
            BackendError: an array is not C-contiguous, not aligned to 16 bytes, or of 64-bit elements;
                or the device failed.
        """
        with self._lane("lending arrays to XLA"):
            lent = (self._view(first), *(self._cached_view(array) for array in others))
        # What was taken before has been read by work that precedes the event of `first`.
        self._read += self._taken
        self._taken = []
        self._lent = (first, *others)
        return lent

    def take(self, scores: Any) -> Any:
        """The output of the program as a CuPy array, which the lane's stream may read from now on.

        What was lent to the program may be overwritten on the lane's stream from now on, too.

        Raises:
            BackendError: the program or the device failed.
        """
        with self._lane("taking the scores from XLA"):
            taken = self._cupy.from_dlpack(scores)
        # The program has been enqueued behind the lane's reading of these; so will be whatever gets their
        # memory next, as XLA gives freed memory to programs of the same compute stream.
        self._read = []
        self._taken.append(taken)
        return taken

    @contextmanager
    def _lane(self, operation: str) -> Iterator[None]:
        """The lane's stream and device are current inside; failures are named after `operation`."""
        try:
            with device_errors(operation), self._device, self._stream:
                yield
        except self._xla_error as error:
            raise BackendError(f"{operation}: {str(error).splitlines()[0]}") from error

    def _cached_view(self, array: Any) -> Any:
        key = (array.data.ptr, array.shape, array.dtype.str)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[key] = self._view(array)
        return view

    def _view(self, array: Any) -> Any:
        aligned = array.data.ptr % _ALIGNMENT_BYTES == 0
        if not (aligned and array.flags.c_contiguous and array.dtype.name in _DTYPES):
            raise BackendError(
                f"XLA cannot take {array.dtype.name} {array.shape} at {array.data.ptr:#x}"
                f" with strides of {array.strides} bytes as it is"
            )
        return self._from_dlpack(array, copy=False)


class TensorFlowHandover:
    """Hands arrays between one lane's stream and one logical GPU of TensorFlow; nothing is asynchronous.

    ``logical`` is the number of TensorFlow's device, ``GPU:<logical>``, several of which may share the
    physical GPU of the stream.
    """

    def __init__(self, stream: Any, *, logical: int) -> None:
        import cupy
        import tensorflow as tf

        self._cupy = cupy
        self._dlpack = tf.experimental.dlpack
        self._stream = stream
        self._device = cupy.cuda.Device(stream.device_id)
        self._logical = logical
        self._taken: list[Any] = []

    def lend(self, *arrays: Any) -> tuple[Any, ...]:
        """TensorFlow tensors over the memory of CuPy arrays, after the host waited for the lane's stream.

        Raises:
            BackendError: an array is not C-contiguous, or the device failed.
        """
        with device_errors("lending arrays to TensorFlow"), self._device:
            self._stream.synchronize()
            self._taken = []  # read by now: the stream that reads them is idle
            return tuple(self._lend(array) for array in arrays)

    def take(self, scores: Any) -> Any:
        """A tensor as a CuPy array, after the host waited for TensorFlow's device."""
        capsule = self._dlpack.to_dlpack(scores)
        with (
            device_errors("taking the scores from TensorFlow"),
            self._device,
            device_id(capsule, self._stream.device_id),
        ):
            taken = self._cupy.from_dlpack(capsule)
        # TensorFlow would give the memory to its next program, while the lane's stream may still read it.
        self._taken.append(taken)
        return taken

    def _lend(self, array: Any) -> Any:
        if not array.flags.c_contiguous:
            raise BackendError(f"cannot lend an array with strides {array.strides} to TensorFlow")
        capsule = array.__dlpack__(stream=-1)  # -1: the order is already made
        with device_id(capsule, self._logical):
            return self._dlpack.from_dlpack(capsule)


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h, the same in every version of it so far."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_UNVERSIONED = b"dltensor"
_DEVICE_TYPES = (1, 2)  # kDLCPU, kDLCUDA

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@contextmanager
def device_id(capsule: Any, number: int) -> Iterator[None]:
    """Let an unused DLPack capsule name device ``number`` inside the block.

    For a consumer that counts devices otherwise than the producer, who finds its own number afterwards.

    The consumer must keep what it made of the capsule until the block ends.

    Raises:
        BackendError: not an unused capsule of a ``DLManagedTensor``, in which the tensor comes first
            (``DLManagedTensorVersioned`` of DLPack 1.0 begins otherwise).
    """
    name = _capsule_name(capsule) if type(capsule).__name__ == "PyCapsule" else None
    if name != _UNVERSIONED:
        raise BackendError(f"expected an unused capsule {_UNVERSIONED!r}, found {name!r}")
    device = _DLTensor.from_address(_capsule_pointer(capsule, name)).device
    if device.device_type not in _DEVICE_TYPES:
        raise BackendError(
            f"expected a capsule of the CPU or a CUDA GPU, found device type {device.device_type}"
        )
    before = device.device_id
    device.device_id = number
    try:
        yield
    finally:
        device.device_id = before
