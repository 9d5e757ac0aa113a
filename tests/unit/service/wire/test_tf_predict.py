from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nann.engine.errors import InvalidQuery
from nann.engine.types import Hits
from nann.service.errors import UnknownSignature
from nann.service.types import ModelMetadata, RetrieveReply, VersionStatus
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor
from nann.service.wire.tf_choice import model_choice, servable_not_found
from nann.service.wire.tf_predict import (
    metadata_response,
    predict_call,
    predict_response,
    status_response,
)

LEVEL_TOPN = np.array([4, 5, 6, 7, 8, 9], dtype=np.int32)


def metadata(item_id_type: str = "int") -> ModelMetadata:
    return ModelMetadata(
        model="nann",
        version=3,
        num_items=100,
        history_length=3,
        input_dim=2,
        item_id_type=item_id_type,
        user_id_type="int",
        profiles=(),
    )


def request(signature: str = "", outputs: tuple[str, ...] = (), **inputs: Any) -> Any:
    message = tf_messages.PredictRequest(output_filter=outputs)
    message.model_spec.name = "nann"
    message.model_spec.signature_name = signature
    given = {"comm_seq": np.zeros((1, 6), dtype=np.float16), "level_topn": LEVEL_TOPN, **inputs}
    for name, value in given.items():
        if value is not None:
            encode_tensor(value, message.inputs[name])
    return message


def reply(*item_ids: int | str) -> RetrieveReply:
    scores = [-0.5 * rank for rank in range(len(item_ids))]
    return RetrieveReply(Hits(item_ids, scores, n_scored=1, steps=1), "nann", 3)


def test_a_row_is_a_retrieval_that_forgets_what_was_seen() -> None:
    comm_seq = np.arange(12, dtype=np.float32).reshape(2, 6)
    call = predict_call(request(comm_seq=comm_seq), metadata())
    assert [row.comm_seq.tolist() for row in call.requests if row.comm_seq is not None] == comm_seq.tolist()
    for row in call.requests:
        assert row.params is not None
        assert row.params.level_topn == (4, 5, 6, 7, 8, 9)
        assert row.params.policy is None
        assert row.exclude_seen is False
        assert (row.model, row.version) == ("nann", 3)
    assert (call.k, call.signature, call.outputs) == (9, "serving_default", ("top_k",))


def test_half_and_float_and_a_level_topn_of_one_row() -> None:
    half = np.array([[0.1, 1, 2, 3, 4, 65504]], dtype=np.float16)
    call = predict_call(request(comm_seq=half, level_topn=LEVEL_TOPN[None]), metadata())
    vector = call.requests[0].comm_seq
    assert vector is not None
    assert vector.dtype == np.float32
    assert vector.tolist() == half.astype(np.float32)[0].tolist()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            request(level_topn=None),
            r"input size does not match signature: 1!=2 len\({comm_seq}\) != len\({comm_seq,level_topn}\). "
            r"Sent extra: {}. Missing but required: {level_topn}.",
        ),
        (request(other=LEVEL_TOPN), r"3!=2 .* Sent extra: {other}. Missing but required: {}."),
        (request(comm_seq=None, seq=LEVEL_TOPN), r"Sent extra: {seq}. Missing but required: {comm_seq}."),
        (request(comm_seq=np.zeros((1, 7), np.float16)), r"expected shape \[batch,6\], found \[1, 7\]"),
        (request(comm_seq=np.zeros(6, np.float16)), r"expected shape \[batch,6\], found \[6\]"),
        (request(comm_seq=np.zeros((1, 6), np.int32)), "expected dtype DT_HALF or DT_FLOAT, found DT_INT32"),
        (request(comm_seq=np.full((1, 6), np.nan, np.float16)), "element 0 is not a finite number"),
        (request(level_topn=LEVEL_TOPN.astype(np.int64)), "expected dtype DT_INT32, found DT_INT64"),
        (request(level_topn=LEVEL_TOPN[:5]), r"expected shape \[6\], found \[5\]"),
        (request(level_topn=np.stack([LEVEL_TOPN] * 2)), r"found \[2, 6\]"),
        (request(outputs=("top_j",)), "output tensor alias not found in signature: top_j"),
        (request(outputs=("scores",)), "output tensor alias not found in signature: scores"),
        (request(outputs=("top_k", "top_k")), "duplicate output tensor alias: top_k"),
    ],
)
def test_wrong_requests(message: Any, text: str) -> None:
    with pytest.raises(InvalidQuery, match=text):
        predict_call(message, metadata())


@pytest.mark.parametrize("name", ["predict", "encode_user", "encode_user_comm_seq", "encode_items", "score"])
def test_raw_and_unknown_signatures_are_not_served(name: str) -> None:
    with pytest.raises(UnknownSignature, match=f'^Serving signature key "{name}" not found.$'):
        predict_call(request(name), metadata())


def outputs_of(message: Any, replies: list[RetrieveReply], kind: str = "int") -> dict[str, Any]:
    call = predict_call(message, metadata(kind))
    response = predict_response(call, replies, metadata(kind))
    assert response.model_spec.name == "nann"
    assert response.model_spec.version.value == 3
    assert response.model_spec.signature_name == call.signature
    assert not any(tensor.tensor_content for tensor in response.outputs.values())
    return {name: decode_tensor(tensor, name) for name, tensor in response.outputs.items()}


def test_one_row_keeps_its_true_length() -> None:
    (top_k,) = outputs_of(request(), [reply(7, 8)]).values()
    assert top_k.dtype == np.int64
    assert top_k.tolist() == [[7, 8]]
    assert outputs_of(request(), [reply()])["top_k"].shape == (1, 0)


def test_more_rows_are_padded_to_k() -> None:
    two = request("retrieve", comm_seq=np.zeros((2, 6), np.float16))
    outputs = outputs_of(two, [reply(7, 8), reply(1)])
    assert outputs["top_k"].tolist() == [[7, 8, *[-1] * 7], [1, *[-1] * 8]]
    assert outputs["scores"].dtype == np.float32
    assert outputs["scores"][0, :3].tolist() == [0.0, -0.5, -np.inf]


def test_output_filter_and_string_ids() -> None:
    assert list(outputs_of(request("retrieve", ("top_k",)), [reply(7)])) == ["top_k"]
    two = request(comm_seq=np.zeros((2, 6), np.float16))
    top_k = outputs_of(two, [reply("a", "é"), reply()], "str")["top_k"]
    assert top_k[0, :3].tolist() == [b"a", "é".encode(), b""]


def test_metadata_shows_the_two_served_signatures() -> None:
    message = tf_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    response = metadata_response(message, metadata())
    signatures = tf_messages.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert set(signatures.signature_def) == {"serving_default", "retrieve"}
    served = signatures.signature_def["retrieve"]
    assert [dim.size for dim in served.inputs["comm_seq"].tensor_shape.dim] == [-1, 6]
    assert served.inputs["comm_seq"].dtype == tf_messages.DATA_TYPES["DT_HALF"]
    assert set(served.outputs) == {"top_k", "scores"}
    assert served.method_name == "tensorflow/serving/predict"


@pytest.mark.parametrize(
    ("fields", "text"), [([], "at least one"), (["other"], "Metadata field other is not")]
)
def test_metadata_knows_one_field(fields: list[str], text: str) -> None:
    with pytest.raises(InvalidQuery, match=text):
        metadata_response(tf_messages.GetModelMetadataRequest(metadata_field=fields), metadata())


def test_model_choice() -> None:
    spec = tf_messages.ModelSpec(name="x")
    assert servable_not_found(model_choice(spec)) == "Servable not found for request: Latest(x)"
    spec.version.value = 0
    assert servable_not_found(model_choice(spec)) == "Servable not found for request: Specific(x, 0)"
    spec.version_label = "canary"
    choice = model_choice(spec)
    assert (choice.version, choice.label) == (None, "canary")
    with pytest.raises(InvalidQuery, match=r"^ModelSpec has no name specified\.$"):
        model_choice(tf_messages.ModelSpec())


def test_status() -> None:
    response = status_response(
        [VersionStatus(3, "AVAILABLE"), VersionStatus(2, "END", "DATA_LOSS", "damaged")]
    )
    assert [entry.version for entry in response.model_version_status] == [3, 2]
    assert [entry.state for entry in response.model_version_status] == [30, 50]
    assert response.model_version_status[1].status.error_code == 15
    assert response.model_version_status[1].status.error_message == "damaged"
