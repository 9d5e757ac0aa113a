"""The device number inside a DLPack capsule: rewritten for a consumer, then restored, or refused."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import pytest

from nann.engine.cuda.handover import device_id
from nann.engine.errors import BackendError

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def raw(address: int) -> tuple[int, ...]:
    """Data, device type, device id, ndim, type code, bits, lanes: the head of a DLTensor (dlpack.h)."""
    return struct.unpack("<QiiiBBH", ctypes.string_at(address, 24))


def capsule_of(library: str, array: np.ndarray) -> Any:
    if library == "numpy":
        return array.__dlpack__()
    if library == "jax":
        import jax.numpy as jnp

        return jnp.asarray(array).__dlpack__()
    import tensorflow as tf

    return tf.experimental.dlpack.to_dlpack(tf.constant(array))


@pytest.mark.parametrize("library", ["numpy", "jax", "tensorflow"])
def test_the_number_is_rewritten_and_restored_and_nothing_else_is_touched(library) -> None:
    capsule = capsule_of(library, np.zeros((3, 5), np.float16))
    address = _pointer(capsule, b"dltensor")
    before = raw(address)
    assert before[1:] == (1, 0, 2, 2, 16, 1)
    with device_id(capsule, 7):
        assert raw(address) == (*before[:2], 7, *before[3:])
        with device_id(capsule, 2**31 - 1):
            assert raw(address)[2] == 2**31 - 1
        assert raw(address)[2] == 7
    assert raw(address) == before


def test_it_is_restored_when_the_consumer_fails() -> None:
    capsule = np.zeros(3, np.float32).__dlpack__()
    with pytest.raises(KeyError), device_id(capsule, 4):
        raise KeyError
    assert raw(_pointer(capsule, b"dltensor"))[2] == 0


def test_the_producer_finds_its_own_number_after_the_capsule_was_used() -> None:
    """TensorFlow keeps the producer's struct for its deleter; only the name of the capsule changes."""
    import tensorflow as tf

    array = np.arange(64, dtype=np.float32)
    capsule = array.__dlpack__()
    address = _pointer(capsule, b"dltensor")
    with device_id(capsule, 5):
        tensor = tf.experimental.dlpack.from_dlpack(capsule)
        assert raw(address)[2] == 5
    assert raw(address)[2] == 0
    assert tensor.numpy().tolist() == array.tolist()


def test_a_versioned_capsule_is_refused() -> None:
    """DLManagedTensorVersioned begins with its version: rewriting there would corrupt it."""
    capsule = np.zeros(3, np.float32).__dlpack__(max_version=(1, 0))
    address = _pointer(capsule, b"dltensor_versioned")
    before = ctypes.string_at(address, 64)
    with pytest.raises(BackendError, match="found b'dltensor_versioned'"), device_id(capsule, 1):
        pass
    assert ctypes.string_at(address, 64) == before


class Once:
    """An array whose capsule is given."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_a_used_capsule_is_refused() -> None:
    capsule = np.zeros(3, np.float32).__dlpack__()
    kept = np.from_dlpack(Once(capsule))
    with pytest.raises(BackendError, match="found b'used_dltensor'"), device_id(capsule, 1):
        pass
    assert kept.tolist() == [0, 0, 0]


@pytest.mark.parametrize("thing", [None, np.zeros(3), 5])
def test_what_is_no_capsule_is_refused(thing) -> None:
    with pytest.raises(BackendError, match="expected an unused capsule"), device_id(thing, 1):
        pass


def test_memory_that_is_no_gpu_s_and_no_cpu_s_is_refused() -> None:
    capsule = np.zeros(3, np.float32).__dlpack__()
    device_type = ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8)
    device_type.value = 10  # kDLROCM
    with pytest.raises(BackendError, match="found device type 10"), device_id(capsule, 1):
        pass
    device_type.value = 1
