"""Every row of the error table, provoked over both transports, and every kind of bad input."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from fake_engine import FakeEngine
from transports import Transports

from nann.engine.errors import Overloaded, RetrievalError
from nann.service.errors import ERROR_TABLE, error_row
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.tensors import encode_tensor

SECRET = "/srv/models/secret"
MAX_BYTES = 4 << 20


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    limits = {"max_body_bytes": MAX_BYTES, "max_message_bytes": MAX_BYTES}
    async with Transports(tmp_path, FakeEngine(), **limits).open() as opened:
        yield opened


def make(error_class: type[BaseException]) -> BaseException:
    if error_class.__name__ == "ArtifactError":
        return error_class("manifest.json", expected="x", found=SECRET)  # type: ignore[call-arg]
    return error_class(f"text of {error_class.__name__}")


def fail_with(world: Transports, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    async def fail(*_args: Any, **_more: Any) -> Any:
        raise error

    for method in ("retrieve", "retrieve_many", "record_events", "user", "delete_user"):
        monkeypatch.setattr(world.service, method, fail)


def predict_request(rows: int = 1, **spec: Any) -> Any:
    request = tf_messages.PredictRequest()
    request.model_spec.name = spec.get("name", "nann")
    request.model_spec.signature_name = spec.get("signature", "serving_default")
    encode_tensor(np.zeros((rows, 3200), np.float16), request.inputs["comm_seq"])
    encode_tensor(np.array([100, 200, 200, 200, 200, 50], np.int32), request.inputs["level_topn"])
    return request


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("error_class", ERROR_TABLE, ids=lambda cls: cls.__name__)
async def test_every_row_over_both_transports(
    world: Transports, monkeypatch: pytest.MonkeyPatch, error_class: type[RetrievalError]
) -> None:
    error = make(error_class)
    row = error_row(error)
    fail_with(world, monkeypatch, error)

    response = await world.http.post("/retrieve", json={"user_id": 1}, headers={"x-request-id": "r1"})
    assert response.status_code == row.http_status
    body = response.json()["error"]
    assert (body["code"], body["request_id"]) == (row.code, "r1")
    assert response.headers["x-request-id"] == "r1"
    assert ("retry-after" in response.headers) == (error_class is Overloaded)

    code, details = await status_of(world.native.Retrieve(pb.RetrieveRequest(user_id=pb.Id(number=1))))
    assert code.name == row.grpc_code
    code, tf_details = await status_of(world.predict(predict_request()))
    assert code.name == row.tf_grpc_code
    for text in (body["message"], details, tf_details):
        assert SECRET not in text
        assert text.startswith("internal error" if row.http_status == 500 else str(error))


@pytest.mark.parametrize("error", [KeyError(SECRET), RuntimeError(SECRET), AssertionError(SECRET)])
async def test_a_bug_of_ours_tells_nothing(
    world: Transports, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_with(world, monkeypatch, error)
    for method, path, json in (
        ("POST", "/retrieve", {"user_id": 1}),
        ("POST", "/users/1/events", {"item_ids": [1]}),
        ("GET", "/users/1", None),
        ("DELETE", "/users/1", None),
    ):
        response = await world.http.request(method, path, json=json, headers={"x-request-id": "r2"})
        assert response.status_code == 500
        assert response.json() == {
            "error": {"code": "internal", "message": "internal error", "request_id": "r2"}
        }
    call = world.native.Retrieve(pb.RetrieveRequest(), metadata=(("x-request-id", "r3"),))
    assert await status_of(call) == (grpc.StatusCode.INTERNAL, "internal error, request id r3")


BAD_JSON: list[tuple[Any, int, str]] = [
    ({"user_id": 999}, 404, "999"),
    ({"history": [10], "k": 0}, 422, "k must be"),
    ({"history": [10], "k": 1001}, 422, "k must be"),
    ({"history": [10], "k": 2**62}, 422, "k must be"),
    ({"history": [10], "kk": 5}, 422, "kk: unknown field"),
    ({}, 422, "exactly one of"),
    ({"user_id": 1, "history": [1]}, 422, "exactly one of"),
    ({"comm_seq": [[0.0] * 64] * 49}, 422, "comm_seq must hold 3200"),
    ({"comm_seq": [[1e300] * 64] * 50}, 422, "not a finite number"),
    ({"history": [1.5]}, 422, "history: element 0"),
    ({"history": list(range(10_001))}, 422, "10001"),
    ({"history": [10], "params": {"policy": "magic"}}, 422, "magic"),
    ({"history": [10], "params": {"level_topn": [1, 2]}}, 422, "level_topn must hold 6"),
    ({"history": [10], "params": {"ef": 0}}, 422, "params.ef"),
    ({"history": [10], "profile": "none"}, 422, "unknown profile"),
    ({"history": [10], "profile": "x" * 100_000}, 422, "...TRUNCATED"),
    ({"history": [10], "timeout_ms": 0}, 422, "timeout_ms"),
    ({"history": [10], "model": "other"}, 404, "other"),
    ({"history": [10], "version": 9}, 404, "9"),
    ({"history": [10], "version": 2**63}, 404, str(2**63)),
    ({"queries": []}, 422, "queries"),
    ({"queries": [{"history": [1]}] * 65}, 422, "queries"),
]


@pytest.mark.parametrize(("body", "status", "text"), BAD_JSON)
async def test_bad_bodies(world: Transports, body: Any, status: int, text: str) -> None:
    response = await world.http.post("/retrieve", json=body)
    assert (response.status_code, text in response.json()["error"]["message"]) == (status, True), (
        response.text
    )


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "malformed_json"),
        (b"", {}, 400, "malformed_json"),
        (b'{"history": [NaN]}', {}, 400, "malformed_json"),
        (b'{"comm_seq": [[Infinity]]}', {}, 400, "malformed_json"),
        (b"\xff\xfe", {}, 400, "malformed_json"),
        (b"[" * 100_000, {}, 400, "malformed_json"),
        (b'{"user_id": "\\ud800"}', {}, 400, "malformed_json"),
        (b"null", {}, 422, "invalid_query"),
        (b'{"user_id": 1}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"user_id=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b'{"user_id": "' + b"x" * (10 << 20) + b'"}', {}, 413, "payload_too_large"),
    ],
    ids=range(11),
)
async def test_bodies_that_are_no_query(
    world: Transports, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    response = await world.http.post(
        "/retrieve", content=content, headers={"content-type": "application/json", **headers}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_body_without_a_length_is_bounded_while_it_is_read(world: Transports) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    try:
        response = await world.http.post("/retrieve", content=endless())
        assert response.status_code == 413
    except (httpx.WriteError, httpx.RemoteProtocolError):
        # The server may close while the client still sends.
        assert sent < 1000 << 16


async def test_paths_and_methods_that_do_not_exist(world: Transports) -> None:
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/retrieve", 405, "method_not_allowed"),
        ("PUT", "/users/1", 405, "method_not_allowed"),
        ("GET", "/docs-assets/../../etc/passwd", 404, "not_found"),
        ("GET", "/docs-assets/%2e%2e/core.py", 404, "not_found"),
    ):
        response = await world.http.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), path


def retrieve(**fields: Any) -> pb.RetrieveRequest:
    return pb.RetrieveRequest(**{"history": pb.IdList(ids=[pb.Id(number=10)]), **fields})


BAD_PROTO: list[tuple[pb.RetrieveRequest, str, str]] = [
    (pb.RetrieveRequest(user_id=pb.Id(number=999)), "NOT_FOUND", "999"),
    (pb.RetrieveRequest(user_id=pb.Id()), "INVALID_ARGUMENT", "user_id"),
    (pb.RetrieveRequest(), "INVALID_ARGUMENT", "exactly one of"),
    (retrieve(k=0), "INVALID_ARGUMENT", "k must be"),
    (retrieve(k=1001), "INVALID_ARGUMENT", "k must be"),
    (retrieve(model="other"), "NOT_FOUND", "other"),
    (retrieve(version=9), "NOT_FOUND", "9"),
    (retrieve(profile="x" * 100_000), "INVALID_ARGUMENT", "...TRUNCATED"),
    (retrieve(timeout_ms=float("nan")), "INVALID_ARGUMENT", "timeout_ms"),
    (retrieve(params=pb.SearchParams(level_topn=[1])), "INVALID_ARGUMENT", "level_topn"),
    (
        pb.RetrieveRequest(comm_seq=pb.EmbeddedHistory(values=[float("nan")] * 3200)),
        "INVALID_ARGUMENT",
        "finite",
    ),
    (pb.RetrieveRequest(comm_seq=pb.EmbeddedHistory(values=[0.0] * 7)), "INVALID_ARGUMENT", "3200"),
]


@pytest.mark.parametrize(("request_", "code", "text"), BAD_PROTO, ids=range(len(BAD_PROTO)))
async def test_bad_messages(world: Transports, request_: pb.RetrieveRequest, code: str, text: str) -> None:
    found, details = await status_of(world.native.Retrieve(request_))
    assert (found.name, text in details) == (code, True), details


@pytest.mark.parametrize(
    "path",
    [
        "/nann.retrieval.v1.RetrievalService/Retrieve",
        "/nann.retrieval.v1.RetrievalService/BatchRetrieve",
        "/nann.retrieval.v1.RetrievalService/GetUser",
        "/tensorflow.serving.PredictionService/Predict",
        "/tensorflow.serving.ModelService/GetModelStatus",
    ],
)
async def test_bytes_that_are_no_message(world: Transports, path: str) -> None:
    for raw in (b"\xff\xff\xff", b"\x0a\xff", b"\x0a\x05ab"):
        code, details = await status_of(world.raw(path, raw))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "the bytes sent are not a" in details


async def test_a_message_of_10_mb(world: Transports) -> None:
    code, _ = await status_of(world.raw("/nann.retrieval.v1.RetrievalService/Retrieve", b"\0" * (10 << 20)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def with_version(version: int) -> Any:
    request = predict_request()
    request.model_spec.version.value = version
    return request


def with_label(label: str) -> Any:
    request = predict_request()
    request.model_spec.version_label = label
    return request


def without(name: str) -> Any:
    request = predict_request()
    del request.inputs[name]
    return request


def with_input(name: str, value: np.ndarray[Any, Any]) -> Any:
    request = predict_request()
    request.inputs[name].Clear()
    encode_tensor(value, request.inputs[name])
    return request


BAD_PREDICT: list[tuple[Any, str, str]] = [
    (predict_request(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    (predict_request(name="x"), "NOT_FOUND", "Servable not found for request: Latest(x)"),
    (with_version(3), "NOT_FOUND", "Servable not found for request: Specific(nann, 3)"),
    (with_label("canary"), "INVALID_ARGUMENT", "canary"),
    (predict_request(signature="s"), "FAILED_PRECONDITION", 'Serving signature key "s" not found.'),
    (predict_request(signature="score"), "FAILED_PRECONDITION", 'key "score" not found.'),
    (without("level_topn"), "INVALID_ARGUMENT", "input size does not match signature: 1!=2"),
    (predict_request(rows=65), "INVALID_ARGUMENT", "65"),
    (predict_request(rows=0), "INVALID_ARGUMENT", "0"),
    (with_input("comm_seq", np.full((1, 3200), np.inf, np.float16)), "INVALID_ARGUMENT", "finite"),
    (with_input("comm_seq", np.zeros((1, 3201), np.float16)), "INVALID_ARGUMENT", "shape [batch,3200]"),
    (with_input("comm_seq", np.zeros((1, 3200), np.float64)), "INVALID_ARGUMENT", "found DT_DOUBLE"),
    (with_input("level_topn", np.zeros(6, np.int32)), "INVALID_ARGUMENT", "level_topn"),
    (with_input("level_topn", np.full(6, 2**31 - 1, np.int32)), "INVALID_ARGUMENT", "level_topn"),
]


@pytest.mark.parametrize(("request_", "code", "text"), BAD_PREDICT, ids=range(len(BAD_PREDICT)))
async def test_bad_predict_requests(world: Transports, request_: Any, code: str, text: str) -> None:
    found, details = await status_of(world.predict(request_))
    assert (found.name, text in details) == (code, True), details


async def test_before_the_model_is_loaded(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine()).open(load=False) as world:
        response = await world.http.post("/retrieve", json={"user_id": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        code, _ = await status_of(world.native.Retrieve(retrieve()))
        assert code is grpc.StatusCode.UNAVAILABLE
        code, _ = await status_of(world.predict(predict_request()))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_deadline_reaches_the_service(world: Transports) -> None:
    world.engine.gate.clear()
    try:
        response = await world.http.post("/retrieve", json={"history": [10], "timeout_ms": 20})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        code, _ = await status_of(world.native.Retrieve(retrieve(timeout_ms=20.0)))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        code, _ = await status_of(world.native.Retrieve(retrieve(), timeout=0.05))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        world.engine.gate.set()


@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_a_caller_who_hangs_up_cancels_the_work(
    world: Transports, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait_for_ever(*_args: Any, **_more: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    monkeypatch.setattr(world.service, "retrieve", wait_for_ever)
    if transport == "rest":
        call: Any = asyncio.ensure_future(world.http.post("/retrieve", json={"user_id": 1}))
    else:
        call = world.native.Retrieve(retrieve())
    await asyncio.wait_for(started.wait(), 10)
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), 10)
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_one_bad_query_of_a_batch_spoils_no_other(world: Transports) -> None:
    queries = [{"user_id": 1, "k": 2}, {"user_id": 999}, {"user_id": 2, "k": 1}]
    response = await world.http.post("/retrieve", json={"queries": queries})
    assert response.status_code == 200
    first, second, third = response.json()["results"]
    assert (len(first["items"]), second["error"]["code"], len(third["items"])) == (2, "unknown_user", 1)
