"""TensorFlow Serving's Predict, GetModelMetadata and GetModelStatus, as plain conversions.

Texts of errors are TensorFlow Serving's where clients may look for them
(reference/tensorflow-serving.md, "Error statuses").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nann.engine.errors import InvalidQuery, RetrievalError
from nann.service.errors import UnknownSignature
from nann.service.types import ParamOverrides, RetrieveRequest
from nann.service.wire.checks import finite_vector
from nann.service.wire.tensors import decode_tensor, encode_tensor
from nann.service.wire.tf_messages import (
    DATA_TYPES,
    GetModelMetadataResponse,
    GetModelStatusResponse,
    ModelVersionStatus,
    PredictResponse,
    SignatureDefMap,
    data_type_name,
)

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.service.types import ModelMetadata, RetrieveReply, VersionStatus

__all__ = [
    "DEFAULT_SIGNATURE",
    "INPUTS",
    "LEVEL_TOPN_LENGTH",
    "SIGNATURES",
    "PredictCall",
    "metadata_response",
    "plan_predict",
    "predict_call",
    "predict_outputs",
    "predict_response",
    "status_response",
    "whole",
]

DEFAULT_SIGNATURE: Final = "serving_default"
LEVEL_TOPN_LENGTH: Final = 6  # t0 … t5: reference/nann.md, "Served"
# Signature -> its outputs. The SavedModel's raw signatures (encode_user, score, …) are not served.
SIGNATURES: Final[dict[str, tuple[str, ...]]] = {
    DEFAULT_SIGNATURE: ("top_k",),
    "retrieve": ("scores", "top_k"),
}
# Input -> dtypes taken; the first is the one the metadata shows (NANN's own).
INPUTS: Final[dict[str, tuple[str, ...]]] = {
    "comm_seq": ("DT_HALF", "DT_FLOAT"),
    "level_topn": ("DT_INT32",),
}
_PREDICT_METHOD: Final = "tensorflow/serving/predict"
_SIGNATURE_DEF: Final = "signature_def"


@dataclass(frozen=True, slots=True)
class PredictCall:
    """A Predict request, understood: one retrieval a row, and what to answer."""

    requests: list[RetrieveRequest]
    k: int
    signature: str
    outputs: tuple[str, ...]


def predict_call(message: Any, metadata: ModelMetadata) -> PredictCall:
    """The retrievals a PredictRequest asks for.

    Raises UnknownSignature, or InvalidQuery for a wrong set, dtype, shape or content of inputs, and
    for a bad output_filter.
    """
    signature = message.model_spec.signature_name or DEFAULT_SIGNATURE
    if signature not in SIGNATURES:
        raise UnknownSignature(f'Serving signature key "{signature}" not found.')
    _check_input_names(message.inputs)
    outputs = _wanted_outputs(message.output_filter, SIGNATURES[signature])
    comm_seq = _comm_seq(message.inputs["comm_seq"], metadata.history_length * metadata.input_dim)
    level_topn = _level_topn(message.inputs["level_topn"])
    return plan_predict(signature, outputs, comm_seq, level_topn.tolist(), metadata)


def plan_predict(
    signature: str,
    outputs: tuple[str, ...],
    comm_seq: Float32[np.ndarray, "batch width"],
    level_topn: Sequence[int],
    metadata: ModelMetadata,
) -> PredictCall:
    """One retrieval for each row of `comm_seq`, on the version that `metadata` describes."""
    widths = tuple(level_topn)
    requests = [
        RetrieveRequest(
            with_attributes=False,  # a tensor has no place for them
            comm_seq=row,
            model=metadata.model,
            version=metadata.version,
            params=ParamOverrides(level_topn=widths),
            # NANN's server knows nothing of seen items.
            exclude_seen=False,
        )
        for row in comm_seq
    ]
    return PredictCall(requests, k=widths[-1], signature=signature, outputs=outputs)


def whole(results: Iterable[RetrieveReply | RetrievalError]) -> list[RetrieveReply]:
    """The replies of all rows; raises the error of the first that failed: a tensor has no place for it."""
    replies = []
    for result in results:
        if isinstance(result, RetrievalError):
            raise result
        replies.append(result)
    return replies


def predict_response(call: PredictCall, replies: Sequence[RetrieveReply], metadata: ModelMetadata) -> Any:
    """The PredictResponse."""
    response = PredictResponse()
    _fill_spec(response.model_spec, metadata, call.signature)
    for name, table in predict_outputs(call, replies, metadata).items():
        encode_tensor(table, response.outputs[name])
    return response


def predict_outputs(
    call: PredictCall, replies: Sequence[RetrieveReply], metadata: ModelMetadata
) -> dict[str, np.ndarray[Any, Any]]:
    """The wanted outputs: one row keeps its true length, more are padded to k with -1 ("" for strings)."""
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    ids = [list(reply.hits.item_ids) for reply in replies]
    width = len(ids[0]) if len(ids) == 1 else max(call.k, *map(len, ids))
    if "top_k" in call.outputs:
        if metadata.item_id_type == "str":
            table = np.full((len(ids), width), "", dtype=object)
        else:
            table = np.full((len(ids), width), -1, dtype=np.int64)
        outputs["top_k"] = _filled(table, ids)
    if "scores" in call.outputs:
        # A padded place ranks below every real one.
        padding = np.full((len(ids), width), -np.inf, dtype=np.float32)
        outputs["scores"] = _filled(padding, [list(reply.hits.scores) for reply in replies])
    return outputs


def metadata_response(message: Any, metadata: ModelMetadata) -> Any:
    """The GetModelMetadataResponse: both served signatures; raises InvalidQuery for any other field."""
    if not message.metadata_field:
        raise InvalidQuery("GetModelMetadataRequest must specify at least one metadata_field")
    for field in message.metadata_field:
        if field != _SIGNATURE_DEF:
            raise InvalidQuery(f"Metadata field {field} is not supported")
    response = GetModelMetadataResponse()
    _fill_spec(response.model_spec, metadata, "")
    signatures = SignatureDefMap()
    width = metadata.history_length * metadata.input_dim
    item_id_dtype = "DT_STRING" if metadata.item_id_type == "str" else "DT_INT64"
    for name, outputs in SIGNATURES.items():
        signature = signatures.signature_def[name]
        signature.method_name = _PREDICT_METHOD
        _fill_info(signature.inputs["comm_seq"], f"{name}_comm_seq:0", INPUTS["comm_seq"][0], (-1, width))
        _fill_info(
            signature.inputs["level_topn"],
            f"{name}_level_topn:0",
            INPUTS["level_topn"][0],
            (LEVEL_TOPN_LENGTH,),
        )
        for output in outputs:
            dtype = item_id_dtype if output == "top_k" else "DT_FLOAT"
            _fill_info(signature.outputs[output], f"{name}_{output}:0", dtype, (-1, -1))
    response.metadata[_SIGNATURE_DEF].Pack(signatures)
    return response


def status_response(statuses: Iterable[VersionStatus]) -> Any:
    """The GetModelStatusResponse of some versions, in the order given."""
    response = GetModelStatusResponse()
    states = ModelVersionStatus.DESCRIPTOR.enum_types_by_name["State"].values_by_name
    for status in statuses:
        entry = response.model_version_status.add(version=status.version, state=states[status.state].number)
        error_codes = entry.status.DESCRIPTOR.fields_by_name["error_code"].enum_type.values_by_name
        entry.status.error_code = error_codes[status.error_code].number
        entry.status.error_message = status.error_message
    return response


def _check_input_names(inputs: Mapping[str, Any]) -> None:
    sent, expected = set(inputs), set(INPUTS)
    if sent == expected:
        return

    def names(some: Iterable[str]) -> str:
        return "{" + ",".join(sorted(some)) + "}"

    raise InvalidQuery(
        f"input size does not match signature: {len(sent)}!={len(expected)} "
        f"len({names(sent)}) != len({names(expected)}). "
        f"Sent extra: {names(sent - expected)}. Missing but required: {names(expected - sent)}."
    )


def _wanted_outputs(output_filter: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    seen: set[str] = set()
    for name in output_filter:
        if name not in known:
            raise InvalidQuery(
                f"output tensor alias not found in signature: {name} "
                f"Outputs expected to be in the set {{{','.join(known)}}}."
            )
        if name in seen:
            raise InvalidQuery(f"duplicate output tensor alias: {name}")
        seen.add(name)
    return tuple(output_filter) or known


def _comm_seq(tensor: Any, width: int) -> Float32[np.ndarray, "batch width"]:
    array = _typed(tensor, "comm_seq")
    if array.ndim != 2 or array.shape[1] != width:
        raise InvalidQuery(f"input 'comm_seq': expected shape [batch,{width}], found {list(array.shape)}")
    return finite_vector(array, "input 'comm_seq'").reshape(array.shape)


def _level_topn(tensor: Any) -> Int32[np.ndarray, " six"]:
    array = _typed(tensor, "level_topn")
    if array.shape not in ((LEVEL_TOPN_LENGTH,), (1, LEVEL_TOPN_LENGTH)):
        raise InvalidQuery(
            f"input 'level_topn': expected shape [{LEVEL_TOPN_LENGTH}], found {list(array.shape)}"
        )
    return array.reshape(-1)


def _typed(tensor: Any, name: str) -> np.ndarray[Any, Any]:
    found = data_type_name(tensor.dtype)
    if found not in INPUTS[name]:
        raise InvalidQuery(f"input {name!r}: expected dtype {' or '.join(INPUTS[name])}, found {found}")
    return decode_tensor(tensor, name)


def _filled(table: np.ndarray[Any, Any], rows: Sequence[Sequence[Any]]) -> np.ndarray[Any, Any]:
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table


def _fill_spec(spec: Any, metadata: ModelMetadata, signature: str) -> None:
    spec.name = metadata.model
    spec.version.value = metadata.version
    spec.signature_name = signature


def _fill_info(info: Any, name: str, dtype: str, shape: Sequence[int]) -> None:
    info.name = name
    info.dtype = DATA_TYPES[dtype]
    for size in shape:
        info.tensor_shape.dim.add(size=size)
