"""Where the tensors of a TensorFlow scorer live, and how a backend's arrays become tensors and come back.

`HostMemory` is the CPU's. `GpuMemory` is one lane's share of a GPU: a logical device of TensorFlow, with a
stream, a memory pool and a copy of every weight of its own. **It has not yet run on a GPU**; what a CPU can
show of it is tested (docs/adr/0008-stream-ordering.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nann.engine.errors import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["GpuMemory", "Handover", "HostMemory", "Memory", "split_gpus"]

_ALIGNMENT_BYTES = 64


class Memory(Protocol):
    """What a scorer asks of the memory its tensors live in."""

    @property
    def index_dtype(self) -> str:
        """The type in which a program takes `tile_query`."""
        ...

    def scope(self) -> AbstractContextManager[Any]:
        """Inside it TensorFlow loads, compiles and runs on this memory's device."""
        ...

    def lend(self, *arrays: Any) -> Sequence[Any]:
        """The arrays of one call as tensors, in order after whatever wrote them."""
        ...

    def take(self, tensor: Any) -> Any:
        """A result as an array of the backend, which may read it at once."""
        ...


class Handover(Protocol):
    """`cuda.handover.TensorFlowHandover`, as seen from here."""

    def lend(self, *arrays: Any) -> tuple[Any, ...]: ...

    def take(self, scores: Any) -> Any: ...


class HostMemory:
    """NumPy's memory, shared with TensorFlow where it can be."""

    index_dtype = "int32"

    def __init__(self, tf: Any) -> None:
        self._tf = tf

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def lend(self, *arrays: Any) -> Sequence[Any]:
        return [self._tensor(array) for array in arrays]

    def take(self, tensor: Any) -> Float32[np.ndarray, "tiles rows"]:
        return tensor.numpy()  # type: ignore[no-any-return]

    def _tensor(self, array: Any) -> Any:
        """The array as a tensor, shared where it can be.

        XLA's programs load aligned vectors from their arguments, whatever TensorFlow was handed: one
        that starts elsewhere than at a cache line crashes the process, so it is copied.
        """
        if array.ctypes.data % _ALIGNMENT_BYTES:
            return self._tf.constant(array)
        return self._tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class GpuMemory:
    """The memory of one logical device, as ``GPU:1``; device arrays cross by `handover`, others by copy."""

    # Many kernels of TensorFlow keep int32 tensors of a GPU in host memory, and int32 tensors that came by
    # DLPack have crashed there; the same bits as uint32 are an array like any other.
    index_dtype = "uint32"

    def __init__(self, tf: Any, handover: Handover, *, device: str) -> None:
        self._tf = tf
        self._handover = handover
        self._device = device

    def scope(self) -> AbstractContextManager[Any]:
        return self._tf.device(self._device)  # type: ignore[no-any-return]

    def lend(self, *arrays: Any) -> Sequence[Any]:
        plain = [array.view(self.index_dtype) if array.dtype == np.int32 else array for array in arrays]
        if all(isinstance(array, np.ndarray) for array in plain):
            return [self._tf.constant(array) for array in plain]
        return self._handover.lend(*plain)

    def take(self, tensor: Any) -> Any:
        return self._handover.take(tensor)


def split_gpus(tf: Any, gpus: Sequence[int], *, lanes: int, memory_limit_bytes: int) -> list[list[int]]:
    """Divide each of the physical GPUs into a logical device a lane; gives their numbers, GPU by GPU.

    ``memory_limit_bytes`` is what the lanes of one GPU may take together, weights included. TensorFlow
    sees no other GPU afterwards. It must not have used a GPU before.

    Raises:
        Unsupported: TensorFlow sees no such GPU, or has been using its GPUs already.
    """
    physical = tf.config.list_physical_devices("GPU")
    if missing := [gpu for gpu in gpus if gpu >= len(physical)]:
        raise Unsupported(f"TensorFlow sees {len(physical)} GPUs, so there is no GPU {missing[0]}")
    limit_mib = memory_limit_bytes // lanes // 2**20
    if limit_mib < 1:
        raise Unsupported(f"{memory_limit_bytes} bytes of memory are too few for {lanes} lanes of TensorFlow")
    try:
        tf.config.set_visible_devices([physical[gpu] for gpu in gpus], "GPU")
        for gpu in gpus:
            share = [tf.config.LogicalDeviceConfiguration(memory_limit=limit_mib) for _ in range(lanes)]
            tf.config.set_logical_device_configuration(physical[gpu], share)
    except RuntimeError as error:
        raise Unsupported(f"TensorFlow's GPUs cannot be divided: {error}") from error
    # Logical devices are numbered through the visible GPUs in order of their physical numbers.
    first = {gpu: rank * lanes for rank, gpu in enumerate(sorted(gpus))}
    return [list(range(first[gpu], first[gpu] + lanes)) for gpu in gpus]
