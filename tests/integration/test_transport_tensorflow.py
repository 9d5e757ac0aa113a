"""TensorFlow Serving's surface over real ports: REST's forms, labels, reloads, and what is refused how."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import numpy as np
import pytest
from fake_engine import FakeEngine
from transports import Transports

from nann.engine.errors import Overloaded
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor

LEVEL_TOPN = [9, 9, 9, 9, 9, 4]
COMM_SEQ = np.zeros((1, 3200), np.float16)
INPUTS = {"comm_seq": COMM_SEQ.tolist(), "level_topn": LEVEL_TOPN}


def engine_of(path: Path) -> Any:
    return FakeEngine(model=path.parent.name, version=int(path.name))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    (tmp_path / "nann" / "2").mkdir(parents=True)
    served = Transports(
        tmp_path, FakeEngine(), load_engine=engine_of, version_policy="all", max_body_bytes=1 << 20
    )
    async with served.open() as opened:
        yield opened


async def post(world: Transports, path: str, body: Any) -> httpx.Response:
    """As ``curl -d`` sends it: the content type says that it is a form."""
    return await world.http.post(
        path, content=json.dumps(body), headers={"content-type": "application/x-www-form-urlencoded"}
    )


async def reload(world: Transports, text: str) -> Any:
    from google.protobuf import text_format

    request = tf_messages.ReloadConfigRequest()
    text_format.Parse(text, request.config)
    call = world.tensorflow("tensorflow.serving.ModelService", "HandleReloadConfigRequest")
    return await call(request)


def with_labels(**labels: int) -> str:
    entries = "".join(f'version_labels {{ key: "{k}" value: {v} }}' for k, v in labels.items())
    config = f'name: "nann" base_path: "nann" {entries} model_version_policy {{ all {{}} }}'
    return f"model_config_list {{ config {{ {config} }} }}"


def predict_request(rows: int = 1, signature: str = "", **spec: Any) -> Any:
    request = tf_messages.PredictRequest()
    request.model_spec.name = "nann"
    request.model_spec.signature_name = signature
    if "label" in spec:
        request.model_spec.version_label = spec["label"]
    if "version" in spec:
        request.model_spec.version.value = spec["version"]
    encode_tensor(np.repeat(COMM_SEQ, rows, axis=0), request.inputs["comm_seq"])
    encode_tensor(np.array(LEVEL_TOPN, np.int32), request.inputs["level_topn"])
    return request


async def test_columns_and_rows(world: Transports) -> None:
    response = await post(world, "/v1/models/nann:predict", {"inputs": INPUTS})
    assert response.headers["content-type"] == "application/json"
    assert (response.status_code, response.json()) == (200, {"outputs": [[0, 1, 2, 3]]})
    rows = {"instances": [{"comm_seq": COMM_SEQ[0].tolist(), "level_topn": LEVEL_TOPN}] * 2}
    assert (await post(world, "/v1/models/nann:predict", rows)).json() == {"predictions": [[0, 1, 2, 3]] * 2}
    both = {"signature_name": "retrieve", **rows}
    assert (await post(world, "/v1/models/nann:predict", both)).json()["predictions"][1] == {
        "scores": [0.0, -1.0, -2.0, -3.0],
        "top_k": [0, 1, 2, 3],
    }
    half = {"inputs": {**INPUTS, "comm_seq": {"b64": base64.b64encode(COMM_SEQ.tobytes()).decode()}}}
    assert (await post(world, "/v1/models/nann:predict", half)).json() == {"outputs": [[0, 1, 2, 3]]}


async def test_rows_that_fall_short_are_padded_as_over_grpc(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine(num_items=3)).open() as world:
        rows = {
            "signature_name": "retrieve",
            "inputs": {"comm_seq": np.zeros((2, 3200)).tolist(), "level_topn": LEVEL_TOPN},
        }
        response = await post(world, "/v1/models/nann:predict", rows)
        outputs = json.loads(response.content)["outputs"]
        reply = await world.predict(predict_request(rows=2, signature="retrieve"))
        for name, tensor in reply.outputs.items():
            assert outputs[name] == decode_tensor(tensor, name).tolist()
        assert outputs["top_k"] == [[0, 1, 2, -1]] * 2
        assert b"-Infinity" in response.content
        one = {**rows, "inputs": {**rows["inputs"], "comm_seq": [[0.0] * 3200]}}  # type: ignore[dict-item]
        assert (await post(world, "/v1/models/nann:predict", one)).json()["outputs"]["top_k"] == [[0, 1, 2]]


async def test_strings(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine(item_id_type="str")).open() as world:
        response = await post(world, "/v1/models/nann:predict", {"inputs": INPUTS})
        assert response.json() == {"outputs": [["item0", "item1", "item2", "item3"]]}


async def test_versions_labels_status_and_metadata(world: Transports) -> None:
    await reload(world, with_labels(stable=1, canary=2))
    for path, version in [
        ("", "2"),
        ("/versions/1", "1"),
        ("/versions/2", "2"),
        ("/labels/stable", "1"),
        ("/labels/canary", "2"),
    ]:
        metadata = (await world.http.get(f"/v1/models/nann{path}/metadata")).json()
        assert metadata["model_spec"]["version"] == version
        assert set(metadata["metadata"]["signature_def"]["signature_def"]) == {"serving_default", "retrieve"}
        assert (await post(world, f"/v1/models/nann{path}:predict", {"inputs": INPUTS})).status_code == 200
        status = (await world.http.get(f"/v1/models/nann{path}")).json()["model_version_status"]
        assert status[0] == {
            "version": version,
            "state": "AVAILABLE",
            "status": {"error_code": "OK", "error_message": ""},
        }
        assert len(status) == (1 if path else 2)
    for label, version in {"stable": 1, "canary": 2}.items():
        reply = await world.predict(predict_request(label=label))
        assert reply.model_spec.version.value == version
    assert (await world.http.get("/v1/models/nann/labels/st%61ble")).status_code == 200


async def grpc_failure(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v1/models/x", 404, "Could not find any versions of model x"),
        ("GET", "/v1/models/nann/versions/7", 404, "Could not find version 7 of model nann"),
        ("GET", "/v1/models/nann/labels/best", 400, "Unrecognized servable version label: best"),
        ("GET", "/v1/models/x/metadata", 404, "Servable not found for request: Latest(x)"),
        ("POST", "/v1/models/x:predict", 404, "Servable not found for request: Latest(x)"),
        (
            "POST",
            "/v1/models/nann/versions/7:predict",
            404,
            "Servable not found for request: Specific(nann, 7)",
        ),
        ("POST", "/v1/models/nann/labels/best:predict", 400, "Unrecognized servable version label: best"),
        ("POST", "/v1/models/nann", 400, "Malformed request: POST /v1/models/nann"),
        ("GET", "/v1/models/nann:predict", 400, "Malformed request: GET /v1/models/nann:predict"),
        ("PUT", "/v1/models/nann:predict", 400, "Malformed request: PUT /v1/models/nann:predict"),
        ("POST", "/v1/models/nann:guess", 400, "Malformed request: POST /v1/models/nann:guess"),
        ("GET", "/v1/models/nann/versions/one", 400, "Malformed request: GET /v1/models/nann/versions/one"),
        ("GET", "/v1/", 400, "Malformed request: GET /v1/"),
        ("POST", "/v1/models/nann:classify", 501, "classify is not offered here, only predict"),
        ("POST", "/v1/models/nann/versions/1:regress", 501, "regress is not offered here, only predict"),
    ],
)
async def test_what_is_not_there(world: Transports, method: str, path: str, status: int, error: str) -> None:
    response = await world.http.request(method, path, content=json.dumps({"inputs": INPUTS}))
    assert (response.status_code, response.json()) == (status, {"error": error})
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (b"", 400, "JSON Parse error: The document is empty"),
        (b"{", 400, "JSON Parse error"),
        (b"{}", 400, "Missing 'inputs' or 'instances' key"),
        (b'{"signature_name": "score", "inputs": {}}', 400, 'Serving signature name: "score" not found'),
        (b'{"inputs": {"comm_seq": [[NaN]]}}', 400, "Missing named input: level_topn"),
        (b'{"x": "' + b"x" * (2 << 20) + b'"}', 413, "the body is larger than"),
        (b'{"inputs": {"comm_seq": [[0]], "level_topn": [1,2,3,4,5,6]}}', 400, "unexpected size: 1"),
    ],
    ids=range(7),
)
async def test_bodies_that_are_refused(world: Transports, content: bytes, status: int, error: str) -> None:
    response = await world.http.post("/v1/models/nann:predict", content=content)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert error in response.json()["error"]


async def test_limits_and_refusals_of_the_service(world: Transports, monkeypatch: pytest.MonkeyPatch) -> None:
    too_many = {
        "inputs": {**INPUTS, "comm_seq": [{"b64": base64.b64encode(COMM_SEQ.tobytes()).decode()}] * 65}
    }
    response = await post(world, "/v1/models/nann:predict", too_many)
    assert (response.status_code, "1 to 64 queries" in response.json()["error"]) == (400, True)
    widths = {"inputs": {**INPUTS, "level_topn": [9, 9, 9, 9, 9, 0]}}
    response = await post(world, "/v1/models/nann:predict", widths)
    assert (response.status_code, "level_topn" in response.json()["error"]) == (400, True)

    async def full(*_args: Any, **_more: Any) -> Any:
        raise Overloaded("the queue is full")

    monkeypatch.setattr(world.service, "retrieve_many", full)
    response = await post(world, "/v1/models/nann:predict", {"inputs": INPUTS})
    assert (response.status_code, response.json()) == (503, {"error": "the queue is full"})


async def test_reloads(world: Transports, tmp_path: Path) -> None:
    reply = await reload(world, with_labels(stable=1))
    assert (reply.status.error_code, reply.status.error_message) == (0, "")
    code, details = await grpc_failure(reload(world, with_labels(stable=5)))
    assert code == "FAILED_PRECONDITION"
    assert details.startswith("Request to assign label to version 5 of model nann, which is not currently")
    code, details = await grpc_failure(reload(world, ""))
    assert (code, "Only ModelConfigList is currently supported" in details) == ("INVALID_ARGUMENT", True)
    outside = 'model_config_list { config { name: "etc" base_path: "/etc" } }'
    code, details = await grpc_failure(reload(world, outside))
    assert (code, "/etc" in details) == ("PERMISSION_DENIED", False)
    absent = 'model_config_list { config { name: "x" base_path: "absent" } }'
    code, details = await grpc_failure(reload(world, absent))
    assert (code, str(tmp_path) in details) == ("FAILED_PRECONDITION", False)
    assert (await world.http.get("/healthz")).json()["models"] == ["nann"]
    (tmp_path / "other" / "4").mkdir(parents=True)
    await reload(world, 'model_config_list { config { name: "second" base_path: "other" } }')
    assert (await world.http.get("/healthz")).json()["models"] == ["second"]
    code, _ = await grpc_failure(world.predict(predict_request()))
    assert code == "NOT_FOUND"


async def test_a_rescan_loads_what_is_new_and_tells_the_states(world: Transports, tmp_path: Path) -> None:
    (tmp_path / "nann" / "3").mkdir()
    response = await world.http.post("/models/rescan")
    assert response.status_code == 200
    assert [(one["version"], one["state"]) for one in response.json()["models"]["nann"]] == [
        (3, "AVAILABLE"),
        (2, "AVAILABLE"),
        (1, "AVAILABLE"),
    ]
    assert (await world.http.post("/retrieve", json={"user_id": 1, "k": 1})).json()["version"] == 3


async def test_the_metrics_name_the_models_and_methods(world: Transports) -> None:
    await post(world, "/v1/models/nann:predict", {"inputs": INPUTS})
    await post(world, "/v1/models/x:predict", {"inputs": INPUTS})
    text = (await world.http.get("/metrics")).text
    assert 'nann_requests_total{api="rest",code="ok",method="predict",model="nann"} 1.0' in text
    assert 'nann_requests_total{api="rest",code="unknown_model",method="predict",model="unknown"} 1.0' in text


async def test_clients_of_tensorflow_serving(world: Transports) -> None:
    """Its own message classes, over its own stubs."""
    pytest.importorskip("tensorflow_serving")
    from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc, predict_pb2
    from tensorflow_serving.apis import prediction_service_pb2_grpc as prediction

    request = predict_pb2.PredictRequest.FromString(predict_request(version=1).SerializeToString())
    reply = await prediction.PredictionServiceStub(world.channel).Predict(request)
    assert list(cast("Any", reply).outputs["top_k"].int64_val) == [0, 1, 2, 3]
    reload_request = model_management_pb2.ReloadConfigRequest()
    config = reload_request.config.model_config_list.config.add(name="nann", base_path="nann")
    config.model_platform = "tensorflow"
    config.model_version_policy.specific.versions.append(1)
    config.version_labels["stable"] = 1
    await model_service_pb2_grpc.ModelServiceStub(world.channel).HandleReloadConfigRequest(reload_request)
    assert (await world.predict(predict_request(label="stable"))).model_spec.version.value == 1
