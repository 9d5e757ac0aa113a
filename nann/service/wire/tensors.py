"""TensorProto <-> NumPy, by TensorFlow's own encoding rules and without TensorFlow.

A tensor's elements come as the little-endian bytes of `tensor_content` or in the `*_val` list of its
dtype; a list shorter than the shape repeats its last value, an empty one means zeros (as
`tf.make_ndarray` reads them). Whatever a caller may have written, decoding returns an array of the
stated shape or raises InvalidQuery. Encoding writes the `*_val` lists, as TensorFlow Serving replies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nann.engine.errors import InvalidQuery
from nann.service.wire.tf_messages import DATA_TYPES, TensorProto, data_type_name

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_ELEMENTS", "decode_tensor", "encode_tensor"]

# A short *_val list is expanded to the stated shape, so a few bytes could ask for any amount of
# memory. NANN's widest input is a few thousand values a user; 16 Mi values (64 MiB of float32) hold
# a batch of thousands of users and are far below what hurts.
MAX_ELEMENTS: Final = 1 << 24
# Of those, so many may be left for us to repeat: 327 users of NANN's 3,200 values, made in 4 ms. The whole
# 16 Mi would keep the event loop for 75 ms at the price of a message of 18 bytes.
_MAX_REPEATED: Final = 1 << 20
_MAX_RANK: Final = 8
_INT64_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Where a dtype's elements live in a TensorProto, and what they are in NumPy."""

    field: str
    dtype: np.dtype[Any]
    bit_pattern: bool = False


_ENCODINGS: Final[dict[int, _Encoding]] = {
    DATA_TYPES[name]: encoding
    for name, encoding in {
        "DT_FLOAT": _Encoding("float_val", np.dtype("<f4")),
        "DT_DOUBLE": _Encoding("double_val", np.dtype("<f8")),
        "DT_HALF": _Encoding("half_val", np.dtype("<f2"), bit_pattern=True),
        "DT_INT64": _Encoding("int64_val", np.dtype("<i8")),
        "DT_INT32": _Encoding("int_val", np.dtype("<i4")),
        "DT_INT16": _Encoding("int_val", np.dtype("<i2")),
        "DT_INT8": _Encoding("int_val", np.dtype("<i1")),
        "DT_UINT8": _Encoding("int_val", np.dtype("<u1")),
        "DT_UINT16": _Encoding("int_val", np.dtype("<u2")),
        "DT_UINT32": _Encoding("uint32_val", np.dtype("<u4")),
        "DT_UINT64": _Encoding("uint64_val", np.dtype("<u8")),
        "DT_BOOL": _Encoding("bool_val", np.dtype("?")),
    }.items()
}
_STRING: Final = DATA_TYPES["DT_STRING"]
_DTYPE_TO_PROTO: Final = {encoding.dtype: number for number, encoding in _ENCODINGS.items()}


def decode_tensor(proto: Any, name: str) -> np.ndarray[Any, Any]:
    """The array a TensorProto stands for; strings become an object array of bytes.

    `name` is what the error messages call the tensor. Raises InvalidQuery for an unknown or
    unsupported dtype, an incomplete or too large shape, and content that does not fit the shape.
    """
    shape = _shape(proto, name)
    size = math.prod(shape)
    if proto.dtype == _STRING:
        return _decode_strings(proto, name, shape, size)
    encoding = _ENCODINGS.get(proto.dtype)
    if encoding is None:
        raise InvalidQuery(f"tensor {name!r}: dtype {data_type_name(proto.dtype)} is not supported")
    values = getattr(proto, encoding.field)
    if proto.tensor_content:
        if values:
            raise InvalidQuery(f"tensor {name!r} has both tensor_content and {encoding.field}")
        flat = _from_content(proto.tensor_content, encoding.dtype, size, name)
    else:
        flat = _from_values(values, encoding, size, name)
    return flat.reshape(shape)


def encode_tensor(values: np.ndarray[Any, Any] | Sequence[str], proto: Any | None = None) -> Any:
    """A TensorProto of an array (any supported dtype) or of a list of strings (DT_STRING, UTF-8).

    Writes into `proto` when given, so that a map entry of a response is filled in place. Raises
    TypeError for a dtype that has no encoding: that is our own mistake, never the caller's.
    """
    proto = TensorProto() if proto is None else proto
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    flat = array.reshape(-1)
    if array.dtype == object:
        proto.dtype = _STRING
        proto.string_val.extend(
            text if isinstance(text, bytes) else str(text).encode() for text in flat.tolist()
        )
        return proto
    number = _DTYPE_TO_PROTO.get(array.dtype.newbyteorder("<"))
    if number is None:
        raise TypeError(f"no TensorProto encoding for dtype {array.dtype}")
    encoding = _ENCODINGS[number]
    proto.dtype = number
    bits = flat.astype("<f2").view(np.uint16) if encoding.bit_pattern else flat
    getattr(proto, encoding.field).extend(bits.tolist())
    return proto


def _shape(proto: Any, name: str) -> tuple[int, ...]:
    if proto.tensor_shape.unknown_rank:
        raise InvalidQuery(f"tensor {name!r}: the shape is of unknown rank")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if len(shape) > _MAX_RANK:
        raise InvalidQuery(f"tensor {name!r}: rank {len(shape)} is above {_MAX_RANK}")
    if any(size < 0 for size in shape):
        raise InvalidQuery(f"tensor {name!r}: shape {list(shape)} has an unknown or negative dimension")
    # A zero dimension makes the product zero whatever the others are, so each is bounded by itself too.
    if math.prod(shape) > MAX_ELEMENTS or max(shape, default=0) > MAX_ELEMENTS:
        raise InvalidQuery(f"tensor {name!r}: shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    return shape


def _from_content(content: bytes, dtype: np.dtype[Any], size: int, name: str) -> np.ndarray[Any, Any]:
    expected_bytes = size * dtype.itemsize
    if len(content) != expected_bytes:
        raise InvalidQuery(
            f"tensor {name!r}: tensor_content has {len(content)} bytes, "
            f"its shape and dtype need {expected_bytes}"
        )
    if dtype == np.bool_:
        # A byte other than 0 and 1 is not a bool to NumPy; view it as a number first.
        return np.frombuffer(content, dtype=np.uint8).astype(np.bool_)
    return np.frombuffer(content, dtype=dtype)


def _from_values(values: Any, encoding: _Encoding, size: int, name: str) -> np.ndarray[Any, Any]:
    if len(values) > size:
        raise InvalidQuery(
            f"tensor {name!r}: {encoding.field} has {len(values)} values, its shape holds {size}"
        )
    _check_repeated(size - len(values), name)
    if not values:
        return np.zeros(size, dtype=encoding.dtype)
    wire_dtype = np.dtype("<i8") if encoding.field in ("int_val", "half_val") else encoding.dtype
    numbers = np.array(values, dtype=wire_dtype)
    target = np.dtype("<u2") if encoding.bit_pattern else encoding.dtype
    if wire_dtype != target:
        numbers = _narrowed(numbers, target, encoding.field, name)
    if len(numbers) < size:
        numbers = np.concatenate([numbers, np.repeat(numbers[-1:], size - len(numbers))])
    return numbers.view(encoding.dtype) if encoding.bit_pattern else numbers


def _check_repeated(n_values: int, name: str) -> None:
    if n_values > _MAX_REPEATED:
        raise InvalidQuery(
            f"tensor {name!r}: {n_values} values of its shape are left out, more than {_MAX_REPEATED}"
        )


def _narrowed(
    numbers: np.ndarray[Any, Any], target: np.dtype[Any], field: str, name: str
) -> np.ndarray[Any, Any]:
    limits = np.iinfo(target)
    if numbers.min() < limits.min or numbers.max() > limits.max:
        raise InvalidQuery(f"tensor {name!r}: {field} has values outside {limits.min}…{limits.max}")
    return numbers.astype(target)


def _decode_strings(proto: Any, name: str, shape: tuple[int, ...], size: int) -> np.ndarray[Any, Any]:
    values = list(proto.string_val)
    if proto.tensor_content:
        raise InvalidQuery(f"tensor {name!r}: strings come in string_val, not in tensor_content")
    if len(values) > size:
        raise InvalidQuery(f"tensor {name!r}: string_val has {len(values)} values, its shape holds {size}")
    _check_repeated(size - len(values), name)
    flat = np.empty(size, dtype=object)
    flat[: len(values)] = values
    flat[len(values) :] = values[-1] if values else b""
    return flat.reshape(shape)
