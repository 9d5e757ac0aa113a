"""TensorFlow Serving's REST forms of Predict, metadata and status, as plain conversions.

Two things go beyond TensorFlow Serving: JSON numbers are taken for DT_HALF (it answers 501 and sends its
clients to gRPC), and {"b64": …} holds a row's float16 values, little-endian, as in `tensor_content`.
Texts of errors are its own where clients may look for them (util/json_tensor.cc).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
from google.protobuf.json_format import MessageToDict

from nann.engine.errors import InvalidQuery, Unsupported
from nann.service.errors import UnknownSignature
from nann.service.wire.checks import finite_vector
from nann.service.wire.tf_messages import GetModelMetadataRequest, SignatureDefMap
from nann.service.wire.tf_predict import (
    DEFAULT_SIGNATURE,
    INPUTS,
    LEVEL_TOPN_LENGTH,
    SIGNATURES,
    PredictCall,
    metadata_response,
    plan_predict,
)

if TYPE_CHECKING:
    from jaxtyping import Float32

    from nann.service.types import ModelMetadata, VersionStatus

__all__ = [
    "body_of_metadata",
    "body_of_outputs",
    "body_of_statuses",
    "encode_body",
    "parse_body",
    "predict_call_of_body",
]

_HALF: Final = np.dtype("<f2")
_INT32: Final = range(-(2**31), 2**31)
_MAX_QUOTED: Final = 200


def parse_body(raw: bytes) -> Any:
    """The value of a JSON text in which NaN and Infinity may stand; raises InvalidQuery."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        strict = error
    if not raw:
        raise InvalidQuery("JSON Parse error: The document is empty")
    if b"NaN" not in raw and b"Infinity" not in raw:
        raise InvalidQuery(f"JSON Parse error: {strict}")
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs, which orjson refuses too
    except (ValueError, RecursionError) as error:
        raise InvalidQuery(f"JSON Parse error: {error}") from None
    return value


def predict_call_of_body(body: Any, metadata: ModelMetadata) -> tuple[PredictCall, bool]:
    """The retrievals a :predict body asks for, and whether it is the row form (`instances`).

    Raises:
        InvalidQuery: the body, or a value in it, has another form than the signature's inputs.
        UnknownSignature: it names another signature than those served.
        Unsupported: rows that one tensor cannot hold.
    """
    if not isinstance(body, dict):
        raise InvalidQuery(f"JSON Value: {_quoted(body)} Is not object")
    signature = body.get("signature_name", "") or DEFAULT_SIGNATURE
    if not isinstance(signature, str):
        raise InvalidQuery(
            f"JSON Value: {_quoted(body)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    if signature not in SIGNATURES:
        raise UnknownSignature(f'Serving signature name: "{signature}" not found in signature def')
    if "instances" in body and "inputs" in body:
        raise InvalidQuery(
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
        )
    if "instances" in body:
        inputs, in_rows = _inputs_of_rows(body["instances"]), True
    elif "inputs" in body:
        inputs, in_rows = body["inputs"], False
    else:
        raise InvalidQuery("Missing 'inputs' or 'instances' key")
    comm_seq, level_topn = _named_inputs(inputs)
    width = metadata.history_length * metadata.input_dim
    return (
        plan_predict(
            signature, SIGNATURES[signature], _comm_seq(comm_seq, width), _level_topn(level_topn), metadata
        ),
        in_rows,
    )


def _named_inputs(inputs: Any) -> tuple[Any, Any]:
    if not isinstance(inputs, dict) or set(inputs) == {"b64"}:
        raise InvalidQuery(
            "inputs is a plain value/list, but expecting an object as multiple "
            "input tensors required as per tensorinfo_map"
        )
    for name in INPUTS:
        if name not in inputs:
            raise InvalidQuery(f"Missing named input: {name} in 'inputs' object.")
    if extra := sorted(set(inputs) - set(INPUTS)):
        raise InvalidQuery(f"JSON object: does not have named input: {extra[0]}")
    return inputs["comm_seq"], inputs["level_topn"]


def _inputs_of_rows(instances: Any) -> dict[str, Any]:
    """The columns of rows; `level_topn` is one for all of them, because k is the width of the answer."""
    if not isinstance(instances, list):
        raise InvalidQuery(f"JSON Value: {_quoted(instances)} Excepting 'instances' to be an list/array")
    if not instances:
        raise InvalidQuery("JSON Value: [] No values in 'instances' array")
    if not isinstance(instances[0], dict):
        raise InvalidQuery(
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map"
        )
    for number, instance in enumerate(instances):
        where = f"Failed to process element: {number} of 'instances' list."
        if not isinstance(instance, dict):
            raise InvalidQuery(f"Expecting object but got list at item {number} of input list")
        if unknown := sorted(set(instance) - set(INPUTS)):
            raise InvalidQuery(f"{where} Error: JSON object: does not have named input: {unknown[0]}")
        if set(instance) != set(INPUTS):
            raise InvalidQuery(
                f"{where} JSON object: {_quoted(instance)} keys must be equal to: {','.join(sorted(INPUTS))}"
            )
        if instance["level_topn"] != instances[0]["level_topn"]:
            raise Unsupported(f"{where} Every instance must have the same level_topn")
    return {
        "comm_seq": [instance["comm_seq"] for instance in instances],
        "level_topn": instances[0]["level_topn"],
    }


def _comm_seq(value: Any, width: int) -> Float32[np.ndarray, "batch width"]:
    if _is_base64(value):
        rows = [_half_values(value)]
    elif isinstance(value, list):
        rows = [_row(row, number, width) for number, row in enumerate(value)]
    else:
        raise _wrong_type(value, "half")
    if len(rows) == 1 and rows[0].size and rows[0].size % width == 0:
        rows = list(rows[0].reshape(-1, width))  # one {"b64": …} may hold the whole tensor
    for row in rows:
        if row.shape != (width,):
            raise InvalidQuery(f"input 'comm_seq': expected shape [batch,{width}], found rows of {row.size}")
    if not rows:
        raise InvalidQuery(f"input 'comm_seq': expected shape [batch,{width}], found [0]")
    return finite_vector(np.concatenate(rows), "input 'comm_seq'").reshape(len(rows), width)


def _row(value: Any, number: int, width: int) -> np.ndarray[Any, Any]:
    if _is_base64(value):
        return _half_values(value)
    if isinstance(value, dict):
        raise _wrong_type(value, "half")
    if not isinstance(value, list):
        raise InvalidQuery(
            f"JSON Value: {_quoted(value)} found at incorrect level: 2 in the JSON DOM. Expected at level: 2"
        )
    if len(value) != width:
        raise InvalidQuery(
            f"Encountered list at unexpected size: {len(value)} at level: 1 expected size: {width} "
            f"(input 'comm_seq', row {number})"
        )
    if not set(map(type, value)) <= {int, float}:
        wrong = next(element for element in value if type(element) not in (int, float))
        raise _wrong_type(wrong, "half")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        raise InvalidQuery("Cannot convert JSON value: to half without loss of precision.") from None


def _level_topn(value: Any) -> list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list):
        raise _wrong_type(value, "int32")
    for number in value:
        if type(number) is not int or number not in _INT32:
            raise _wrong_type(number, "int32")
    if len(value) != LEVEL_TOPN_LENGTH:
        raise InvalidQuery(f"input 'level_topn': expected shape [{LEVEL_TOPN_LENGTH}], found [{len(value)}]")
    return value


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _half_values(value: dict[str, str]) -> np.ndarray[Any, Any]:
    try:
        content = base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidQuery("Unable to base64 decode") from None
    if len(content) % _HALF.itemsize:
        raise InvalidQuery(f"input 'comm_seq': {len(content)} bytes of base64 are no float16 values")
    return np.frombuffer(content, dtype=_HALF)


def body_of_outputs(outputs: dict[str, np.ndarray[Any, Any]], *, in_rows: bool) -> dict[str, Any]:
    """``predictions`` or ``outputs``; a single output goes without its name."""
    # As Python's floats, so that the digits are those that /retrieve gives for the same score.
    tables = {name: table.tolist() for name, table in outputs.items()}
    if len(tables) == 1:
        (only,) = tables.values()
        return {"predictions" if in_rows else "outputs": only}
    if not in_rows:
        return {"outputs": tables}
    return {
        "predictions": [dict(zip(tables, row, strict=True)) for row in zip(*tables.values(), strict=True)]
    }


def encode_body(body: Any, *, finite: bool) -> bytes:
    """`body` as JSON; where not all is `finite`, with the tokens NaN, Infinity and -Infinity."""
    return orjson.dumps(body) if finite else json.dumps(body).encode()


def body_of_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    """The reply to ``GET …/metadata``: proto names, numbers of 64 bits as strings, defaults shown."""
    response = metadata_response(GetModelMetadataRequest(metadata_field=["signature_def"]), metadata)
    signatures = SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return {
        "model_spec": {
            "name": metadata.model,
            "signature_name": "",
            "version": str(metadata.version),
        },
        "metadata": {
            "signature_def": MessageToDict(
                signatures, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        },
    }


def body_of_statuses(statuses: Iterable[VersionStatus]) -> dict[str, Any]:
    """The reply to ``GET /v1/models/…``."""
    return {
        "model_version_status": [
            {
                "version": str(status.version),
                "state": status.state,
                "status": {"error_code": status.error_code, "error_message": status.error_message},
            }
            for status in statuses
        ]
    }


def _wrong_type(value: Any, expected: str) -> InvalidQuery:
    return InvalidQuery(
        f"JSON Value: {_quoted(value)} Type: {_type_name(value)} is not of expected type: {expected}"
    )


def _type_name(value: Any) -> str:
    """rapidjson's word for a value's type."""
    match value:
        case None:
            return "Null"
        case bool():
            return str(value)
        case dict():
            return "Object"
        case list():
            return "Array"
        case str():
            return "String"
        case _:
            return "Number"


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…"
