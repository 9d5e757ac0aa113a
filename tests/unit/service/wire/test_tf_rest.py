from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import orjson
import pytest

from nann.engine.errors import InvalidQuery, Unsupported
from nann.service.errors import UnknownSignature
from nann.service.types import ModelMetadata, VersionStatus
from nann.service.wire.tf_rest import (
    body_of_metadata,
    body_of_outputs,
    body_of_statuses,
    encode_body,
    parse_body,
    predict_call_of_body,
)

WIDTH = 6
TOPN = [4, 5, 6, 7, 8, 9]
METADATA = ModelMetadata(
    model="nann",
    version=3,
    num_items=100,
    history_length=2,
    input_dim=3,
    item_id_type="int",
    user_id_type="int",
    profiles=(),
)
ROWS = [[0.5, -1, 2, 0.25, 8, 0.0], [1e-3, 2.0, 3.5, 4.0, 5.0, 6.0]]
HALF = [{"b64": base64.b64encode(np.array(row, "<f2").tobytes()).decode()} for row in ROWS]
BOTH = {"b64": base64.b64encode(np.array(ROWS, "<f2").tobytes()).decode()}


def rows_of(body: Any) -> np.ndarray[Any, Any]:
    call, _ = predict_call_of_body(body, METADATA)
    assert {(r.model, r.version, r.exclude_seen, r.params.level_topn) for r in call.requests if r.params} == {
        ("nann", 3, False, tuple(TOPN))
    }
    return np.array([request.comm_seq for request in call.requests])


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"comm_seq": ROWS, "level_topn": TOPN}},
        {"inputs": {"comm_seq": ROWS, "level_topn": [TOPN]}},
        {"instances": [{"comm_seq": row, "level_topn": TOPN} for row in ROWS]},
    ],
)
def test_numbers_keep_their_float32_value(body: Any) -> None:
    assert np.array_equal(rows_of(body), np.array(ROWS, np.float32))


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"comm_seq": HALF, "level_topn": TOPN}},
        {"inputs": {"comm_seq": BOTH, "level_topn": TOPN}},
        {"inputs": {"comm_seq": [BOTH], "level_topn": TOPN}},
        {"instances": [{"comm_seq": row, "level_topn": TOPN} for row in HALF]},
    ],
)
def test_base64_is_float16(body: Any) -> None:
    assert np.array_equal(rows_of(body), np.array(ROWS, np.float16).astype(np.float32))


def test_signatures_and_their_outputs() -> None:
    inputs = {"comm_seq": ROWS, "level_topn": TOPN}
    for name, outputs in [
        ("", ("top_k",)),
        ("serving_default", ("top_k",)),
        ("retrieve", ("scores", "top_k")),
    ]:
        call, in_rows = predict_call_of_body({"signature_name": name, "inputs": inputs}, METADATA)
        assert (call.outputs, call.k, in_rows) == (outputs, 9, False)
    with pytest.raises(UnknownSignature, match='Serving signature name: "score" not found in signature def'):
        predict_call_of_body({"signature_name": "score", "inputs": inputs}, METADATA)


def columns(comm_seq: Any = ROWS, level_topn: Any = TOPN, **more: Any) -> dict[str, Any]:
    return {"inputs": {"comm_seq": comm_seq, "level_topn": level_topn, **more}}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([], "Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": 1, "instances": 2}, "only one of"),
        ({"signature_name": 7, "inputs": 1}, "'signature_name' key must be a string value"),
        ({"inputs": ROWS}, "inputs is a plain value/list, but expecting an object"),
        ({"inputs": BOTH}, "inputs is a plain value/list"),
        ({"inputs": {"comm_seq": ROWS}}, "Missing named input: level_topn in 'inputs' object."),
        (columns(other=1), "does not have named input: other"),
        (columns(comm_seq=1.5), "JSON Value: 1.5 Type: Number is not of expected type: half"),
        (columns(comm_seq={"x": 1}), "Type: Object is not of expected type: half"),
        (columns(comm_seq=[]), r"expected shape \[batch,6\], found \[0\]"),
        (columns(comm_seq=[1.0] * 6), "JSON Value: 1.0 found at incorrect level: 2"),
        (
            columns(comm_seq=[[1.0] * 5]),
            "Encountered list at unexpected size: 5 at level: 1 expected size: 6",
        ),
        (columns(comm_seq=[ROWS[0], [1.0]]), "Encountered list at unexpected size: 1"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, "6"]]), 'JSON Value: "6" Type: String'),
        (columns(comm_seq=[[1, 2, 3, 4, 5, True]]), "Type: True is not of expected type: half"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, None]]), "Type: Null"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, [6]]]), "Type: Array"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, 1e39]]), "element 5 is not a finite number"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, float("nan")]]), "element 5 is not a finite number"),
        (columns(comm_seq=[[1, 2, 3, 4, 5, 10**400]]), "without loss of precision"),
        (columns(comm_seq={"b64": "?"}), "Unable to base64 decode"),
        (columns(comm_seq={"b64": "AAA="}), "expected shape"),
        (columns(comm_seq={"b64": "AA=="}), "1 bytes of base64"),
        (columns(comm_seq=[{"b64": ""}]), "expected shape"),
        (columns(comm_seq=[HALF[0], {"b64": "AAA="}]), "found rows of 1"),
        (columns(level_topn=7), "not of expected type: int32"),
        (columns(level_topn=[1, 2, 3, 4, 5]), r"expected shape \[6\], found \[5\]"),
        (columns(level_topn=[TOPN, TOPN]), "not of expected type: int32"),
        (
            columns(level_topn=[1, 2, 3, 4, 5, 6.0]),
            "JSON Value: 6.0 Type: Number is not of expected type: int32",
        ),
        (columns(level_topn=[1, 2, 3, 4, 5, 2**31]), "not of expected type: int32"),
        ({"instances": 1}, "Excepting 'instances' to be an list/array"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"instances": ROWS}, "instances is a plain list, but expecting list of objects"),
        (
            {"instances": [{"comm_seq": ROWS[0], "level_topn": TOPN}, 1]},
            "Expecting object but got list at item 1",
        ),
        ({"instances": [{"comm_seq": ROWS[0]}]}, "keys must be equal to: comm_seq,level_topn"),
        ({"instances": [{"comm_seq": ROWS[0], "level": 1}]}, "does not have named input: level"),
    ],
)
def test_what_is_refused_and_how(body: Any, says: str) -> None:
    with pytest.raises(InvalidQuery, match=says):
        predict_call_of_body(body, METADATA)


def test_rows_of_unequal_widths_are_not_offered() -> None:
    rows = [{"comm_seq": row, "level_topn": [*TOPN[:5], k]} for row, k in zip(ROWS, (9, 8), strict=True)]
    with pytest.raises(Unsupported, match="element: 1"):
        predict_call_of_body({"instances": rows}, METADATA)


@pytest.mark.parametrize(
    ("raw", "value"),
    [(b'{"a": 1}', {"a": 1}), (b'{"a": -Infinity}', {"a": float("-inf")}), (b"[Infinity]", [float("inf")])],
)
def test_json_with_tokens_that_are_not_json(raw: bytes, value: Any) -> None:
    assert parse_body(raw) == value
    assert np.isnan(parse_body(b"[NaN]")[0])


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b"[" * 100_000, b"[NaN" + b"[" * 100_000, b'["\\ud800", NaN]', b"[nan]"]
)
def test_what_is_not_json(raw: bytes) -> None:
    with pytest.raises(InvalidQuery, match="JSON Parse error"):
        parse_body(raw)


IDS = np.array([[7, 8], [9, -1]])
SCORES = np.array([[0.1, -1.0], [2.5, -np.inf]], np.float32)


def test_replies() -> None:
    assert body_of_outputs({"top_k": IDS}, in_rows=False) == {"outputs": [[7, 8], [9, -1]]}
    assert body_of_outputs({"top_k": IDS}, in_rows=True) == {"predictions": [[7, 8], [9, -1]]}
    two = {"scores": SCORES, "top_k": IDS}
    assert body_of_outputs(two, in_rows=False) == {
        "outputs": {"scores": SCORES.tolist(), "top_k": IDS.tolist()}
    }
    assert body_of_outputs(two, in_rows=True) == {
        "predictions": [
            {"scores": SCORES[0].tolist(), "top_k": [7, 8]},
            {"scores": SCORES[1].tolist(), "top_k": [9, -1]},
        ]
    }
    strings = np.array([["a", ""]], dtype=object)
    assert body_of_outputs({"top_k": strings}, in_rows=False) == {"outputs": [["a", ""]]}


def test_what_is_not_finite_is_written_as_its_token() -> None:
    body = body_of_outputs({"scores": SCORES}, in_rows=False)
    assert b"-Infinity" in encode_body(body, finite=False)
    assert json.loads(encode_body(body, finite=False)) == body
    finite = {"outputs": SCORES[0].tolist()}
    assert orjson.loads(encode_body(finite, finite=True)) == finite
    assert np.float32(json.loads(encode_body(finite, finite=True))["outputs"][0]) == SCORES[0][0]


def test_metadata_in_proto_names_with_defaults() -> None:
    body = body_of_metadata(METADATA)
    assert body["model_spec"] == {"name": "nann", "signature_name": "", "version": "3"}
    signatures = body["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) == {"serving_default", "retrieve"}
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert signatures["serving_default"]["inputs"]["comm_seq"] == {
        "name": "serving_default_comm_seq:0",
        "dtype": "DT_HALF",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "6", "name": ""}],
            "unknown_rank": False,
        },
    }


def test_statuses() -> None:
    assert body_of_statuses([VersionStatus(3, "END", "INTERNAL", "why")]) == {
        "model_version_status": [
            {"version": "3", "state": "END", "status": {"error_code": "INTERNAL", "error_message": "why"}}
        ]
    }
