"""DLPack capsules over raw memory: real PyCapsules, as whoever takes them apart expects of CuPy.

Structures: dlpack.h of DLPack 1.0 (`DLManagedTensor` and `DLManagedTensorVersioned`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode
_NAMES = {code: kind for kind, code in _KINDS.items()}


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_LAYOUTS: dict[bytes, type[_Managed] | type[_Versioned]] = {
    b"dltensor": _Managed,
    b"dltensor_versioned": _Versioned,
}
_USED = {name: b"used_" + name for name in _LAYOUTS}

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype, _get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.restype, _set_name.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
# The destructor is called with a capsule that has no reference left: it must stay an address.
_prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_is_valid = _prototype(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

# What a capsule's tensor needs until its deleter is called, by the address of the managed structure.
_exported: dict[int, tuple[Any, ...]] = {}


def _forget(address: int) -> None:
    _exported.pop(address, None)


def _forget_unused(capsule: int) -> None:
    for name in _LAYOUTS:
        if _is_valid(capsule, name):  # nobody took it
            _exported.pop(_pointer_of(capsule, name), None)


_release, _destroy = _Deleter(_forget), _Deleter(_forget_unused)


@dataclass(frozen=True, slots=True)
class Imported:
    """A tensor taken from a capsule: `address` counts the byte offset in; `release` ends its use."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: tuple[int, int]
    release: Callable[[], None]


def export(
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device: tuple[int, int],
    owner: object,
    *,
    versioned: bool = False,
) -> Any:
    """A capsule over C-contiguous memory, which keeps `owner` alive until it or its taker is done."""
    ndim = len(shape)
    shape_array = (ctypes.c_int64 * max(ndim, 1))(*shape)
    steps = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(ndim)]
    strides_array = (ctypes.c_int64 * max(ndim, 1))(*steps)
    managed = _Versioned() if versioned else _Managed()
    if isinstance(managed, _Versioned):
        managed.major, managed.minor = 1, 0
    managed.deleter = _release
    managed.tensor = _Tensor(
        address,
        _Device(*device),
        ndim,
        _DataType(_KINDS[dtype.kind], dtype.itemsize * 8, 1),
        shape_array,
        strides_array,
        0,
    )
    at = ctypes.addressof(managed)
    _exported[at] = (managed, shape_array, strides_array, owner)
    name = b"dltensor_versioned" if versioned else b"dltensor"
    return _new(at, name, ctypes.cast(_destroy, ctypes.c_void_p))


def take(capsule: Any) -> Imported:
    """The tensor of an unused capsule, which is used from now on.

    Raises:
        ValueError: not a DLPack capsule, or one that was taken before.
        NotImplementedError, TypeError: an element type that CuPy has not.
    """
    name = _get_name(capsule) if type(capsule).__name__ == "PyCapsule" else None
    if name not in _LAYOUTS:
        raise ValueError(
            f"A DLPack tensor object cannot be consumed multiple times (or no capsule): {capsule!r}"
        )
    at = _get_pointer(capsule, name)
    managed = _LAYOUTS[name].from_address(at)
    tensor = managed.tensor
    kind = _NAMES.get(tensor.dtype.code)
    if kind is None:
        raise NotImplementedError(f"DLPack type code {tensor.dtype.code}")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        steps = tuple(tensor.strides[: tensor.ndim])
        expected = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
        if any(s != e for s, e, n in zip(steps, expected, shape, strict=True) if n > 1):
            raise NotImplementedError(f"strides {steps} of shape {shape}")
    _set_name(capsule, _USED[name])
    deleter = ctypes.cast(
        managed.deleter, ctypes.c_void_p
    ).value  # an address: the structure goes with the call

    def release() -> None:
        if deleter:
            _Deleter(deleter)(at)

    return Imported(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        np.dtype(f"{kind}{tensor.dtype.bits // 8}"),
        (tensor.device.device_type, tensor.device.device_id),
        release,
    )
