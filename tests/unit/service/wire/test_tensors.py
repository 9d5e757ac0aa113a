from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nann.engine.errors import InvalidQuery
from nann.service.wire.tensors import MAX_ELEMENTS, decode_tensor, encode_tensor
from nann.service.wire.tf_messages import DATA_TYPES, TensorProto

NUMERIC = {
    "DT_FLOAT": "f4",
    "DT_DOUBLE": "f8",
    "DT_HALF": "f2",
    "DT_INT64": "i8",
    "DT_INT32": "i4",
    "DT_INT16": "i2",
    "DT_INT8": "i1",
    "DT_UINT8": "u1",
    "DT_UINT16": "u2",
    "DT_UINT32": "u4",
    "DT_UINT64": "u8",
    "DT_BOOL": "?",
}


def tensor(dtype: str, shape: list[int], **fields: Any) -> Any:
    proto = TensorProto(dtype=DATA_TYPES[dtype], **fields)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    return proto


def example(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if dtype.kind == "f":
        return np.array([[0.0, -1.5, 2.0], [np.finfo(dtype).max, 1e-3, -0.0]], dtype=dtype)
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    limits = np.iinfo(dtype)
    return np.array([[0, 1, limits.max], [limits.min, 2, 3]], dtype=dtype)


@pytest.mark.parametrize(("name", "code"), NUMERIC.items())
def test_val_fields_round_trip(name: str, code: str) -> None:
    array = example(np.dtype(code))
    proto = encode_tensor(array)
    assert proto.dtype == DATA_TYPES[name]
    assert not proto.tensor_content
    decoded = decode_tensor(TensorProto.FromString(proto.SerializeToString()), "x")
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize(("name", "code"), NUMERIC.items())
def test_tensor_content(name: str, code: str) -> None:
    array = example(np.dtype(code))
    decoded = decode_tensor(tensor(name, [2, 3], tensor_content=array.tobytes()), "x")
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


def test_half_val_holds_bit_patterns() -> None:
    assert decode_tensor(tensor("DT_HALF", [1], half_val=[15360]), "x").tolist() == [1.0]
    assert list(encode_tensor(np.array([1.0, -2.0], dtype=np.float16)).half_val) == [0x3C00, 0xC000]


def test_short_list_repeats_its_last_value_and_an_empty_one_is_zero() -> None:
    assert decode_tensor(tensor("DT_FLOAT", [2, 2], float_val=[1, 2]), "x").tolist() == [[1, 2], [2, 2]]
    assert decode_tensor(tensor("DT_INT32", [3]), "x").tolist() == [0, 0, 0]
    assert decode_tensor(tensor("DT_HALF", [2], half_val=[0x3C00]), "x").tolist() == [1.0, 1.0]
    assert decode_tensor(tensor("DT_STRING", [3], string_val=[b"a", b"b"]), "x").tolist() == [
        b"a",
        b"b",
        b"b",
    ]


def test_scalars_and_empty_tensors() -> None:
    assert decode_tensor(tensor("DT_INT32", [], int_val=[7]), "x").tolist() == 7
    assert decode_tensor(tensor("DT_FLOAT", [0, 4]), "x").shape == (0, 4)


def test_strings() -> None:
    proto = encode_tensor(np.array([["a", "é"], ["", "z"]], dtype=object))
    assert proto.dtype == DATA_TYPES["DT_STRING"]
    assert decode_tensor(proto, "x").tolist() == [[b"a", "é".encode()], [b"", b"z"]]


def test_agrees_with_numpy_on_big_endian_and_strided_arrays() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    np.testing.assert_array_equal(decode_tensor(encode_tensor(array), "x"), array)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (tensor("DT_FLOAT", [2], tensor_content=b"1234567"), "7 bytes.*need 8"),
        (tensor("DT_FLOAT", [2], float_val=[1, 2, 3]), "3 values, its shape holds 2"),
        (tensor("DT_FLOAT", [1], float_val=[1], tensor_content=b"1234"), "both tensor_content and float_val"),
        (tensor("DT_FLOAT", [-1, 2]), "unknown or negative"),
        (tensor("DT_FLOAT", [1 << 40]), "more than"),
        (tensor("DT_FLOAT", [1 << 30, 1 << 30, 0]), "more than"),
        (tensor("DT_FLOAT", [1] * 9), "rank 9"),
        (tensor("DT_COMPLEX64", [1]), "DT_COMPLEX64 is not supported"),
        (TensorProto(dtype=999), "DT_999 is not supported"),
        (TensorProto(), "DT_INVALID is not supported"),
        (tensor("DT_INT8", [1], int_val=[300]), "outside -128…127"),
        (tensor("DT_HALF", [1], half_val=[-1]), "outside 0…65535"),
        (tensor("DT_STRING", [1], tensor_content=b"x"), "string_val"),
        (tensor("DT_STRING", [1], string_val=[b"x", b"y"]), "2 values"),
    ],
)
def test_malformed_tensors_say_what_is_wrong(proto: Any, message: str) -> None:
    with pytest.raises(InvalidQuery, match=f"tensor 'comm_seq'.*{message}"):
        decode_tensor(proto, "comm_seq")


def test_unknown_rank() -> None:
    proto = TensorProto(dtype=DATA_TYPES["DT_FLOAT"])
    proto.tensor_shape.unknown_rank = True
    with pytest.raises(InvalidQuery, match="unknown rank"):
        decode_tensor(proto, "x")


@pytest.mark.parametrize(
    ("dtype", "field", "value"), [("DT_HALF", "half_val", 15360), ("DT_STRING", "string_val", b"x")]
)
def test_a_few_bytes_do_not_become_much_memory(dtype: str, field: str, value: Any) -> None:
    proto = tensor(dtype, [1 << 21], **{field: [value]})
    with pytest.raises(InvalidQuery, match="left out"):
        decode_tensor(proto, "x")
    proto.tensor_shape.dim[0].size = 1 << 20
    assert decode_tensor(proto, "x").shape == (1 << 20,)


def test_encoding_an_unknown_dtype_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="complex64"):
        encode_tensor(np.zeros(1, dtype=np.complex64))


INT32 = st.integers(-(2**31), 2**31 - 1)
FIELDS = {
    "tensor_content": st.binary(max_size=64),
    "float_val": st.lists(st.floats(width=32), max_size=8),
    "double_val": st.lists(st.floats(), max_size=8),
    "int_val": st.lists(INT32, max_size=8),
    "half_val": st.lists(INT32, max_size=8),
    "string_val": st.lists(st.binary(max_size=8), max_size=8),
    "int64_val": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
    "bool_val": st.lists(st.booleans(), max_size=8),
    "uint32_val": st.lists(st.integers(0, 2**32 - 1), max_size=8),
    "uint64_val": st.lists(st.integers(0, 2**64 - 1), max_size=8),
    "scomplex_val": st.lists(st.floats(width=32), max_size=4),
}


def assert_decodes_or_refuses(proto: Any) -> None:
    try:
        array = decode_tensor(proto, "x")
    except InvalidQuery:
        return
    assert array.shape == tuple(dim.size for dim in proto.tensor_shape.dim)
    assert array.size <= MAX_ELEMENTS


@given(
    dtype=st.sampled_from([*DATA_TYPES.values(), 77]),
    shape=st.lists(st.one_of(st.integers(0, 6), st.integers(-(2**63), 2**63 - 1)), max_size=4),
    fields=st.fixed_dictionaries({}, optional=FIELDS),
)
def test_any_fields_decode_or_are_refused(dtype: int, shape: list[int], fields: dict[str, Any]) -> None:
    proto = TensorProto(dtype=dtype, **fields)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    assert_decodes_or_refuses(proto)


@given(raw=st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(raw: bytes) -> None:
    from google.protobuf.message import DecodeError

    try:
        proto = TensorProto.FromString(raw)
    except DecodeError:
        return
    assert_decodes_or_refuses(proto)


@pytest.mark.slow
def test_matches_tensorflow_where_it_is_imported() -> None:
    """Our reading of TensorFlow's own encodings, and TensorFlow's reading of ours."""
    tf = pytest.importorskip("tensorflow")
    for code in NUMERIC.values():
        array = example(np.dtype(code))
        theirs = tf.make_tensor_proto(array, shape=array.shape)
        np.testing.assert_array_equal(
            decode_tensor(TensorProto.FromString(theirs.SerializeToString()), "x"), array
        )
        theirs.ParseFromString(encode_tensor(array).SerializeToString())
        np.testing.assert_array_equal(tf.make_ndarray(theirs), array)
