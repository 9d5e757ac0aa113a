"""gRPC over a real port: the native service, TensorFlow Serving's, health, reflection."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_engine import PATIENCE_S, FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from transports import Transports

from nann.service.grpc_api.server import create_server
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor

SEED = Path(__file__).resolve().parents[3] / "shared" / "seeds" / "000_0a5036e23bce5640.txt"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    async with Transports(tmp_path, FakeEngine()).open() as opened:
        yield opened


def number(value: int) -> pb.Id:
    return pb.Id(number=value)


async def test_retrieve(world: Transports) -> None:
    request = pb.RetrieveRequest(history=pb.IdList(ids=[number(0), number(4)]), k=3, explain=True)
    call = world.native.Retrieve(request, metadata=(("x-request-id", "r1"),))
    reply = await call
    assert [(hit.item_id.number, hit.score) for hit in reply.items] == [(1, 0.0), (2, -1.0), (3, -2.0)]
    assert (reply.model, reply.version, reply.n_scored) == ("nann", 1, 100)
    assert reply.explain["steps"].int_value == 3
    assert dict(await call.trailing_metadata())["x-request-id"] == "r1"


async def test_a_request_id_is_made_up(world: Transports) -> None:
    call = world.native.Retrieve(pb.RetrieveRequest(user_id=number(1)))
    await call
    assert re.fullmatch("[0-9a-f]{32}", dict(await call.trailing_metadata())["x-request-id"])


async def test_batch_retrieve(world: Transports) -> None:
    queries = [pb.RetrieveRequest(user_id=number(user), k=2) for user in (1, 999)]
    reply = await world.native.BatchRetrieve(pb.BatchRetrieveRequest(queries=queries))
    first, second = reply.results
    assert len(first.response.items) == 2
    assert (second.error.code, second.error.grpc_code) == ("unknown_user", 5)


async def test_the_live_history(world: Transports) -> None:
    user_id = number(7)
    event = pb.RecordEventsRequest(user_id=user_id, item_ids=[number(3), number(4)])
    assert (await world.native.RecordEvents(event)).recorded == 2
    user = await world.native.GetUser(pb.GetUserRequest(user_id=user_id))
    assert [item.number for item in user.history] == [3, 4]
    await world.native.DeleteUser(pb.DeleteUserRequest(user_id=user_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.native.GetUser(pb.GetUserRequest(user_id=user_id))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_overload_says_when_to_come_back(tmp_path: Path) -> None:
    engine = FakeEngine(lanes=1, max_batch=1)
    async with Transports(tmp_path, engine, queue_limit=1, max_queries_per_call=1).open() as world:
        engine.gate.clear()
        request = pb.RetrieveRequest(user_id=number(1))
        calls = [world.native.Retrieve(request) for _ in range(4)]
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(call.code()) for call in calls],
            return_when=asyncio.FIRST_COMPLETED,
            timeout=PATIENCE_S,
        )
        assert {task.result() for task in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        refused = next(call for call in calls if call.done())
        assert int(dict(await refused.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        engine.gate.set()
        codes = [await call.code() for call in calls]
        assert grpc.StatusCode.OK in codes


def predict_request(rows: int, signature: str, dtype: str) -> Any:
    request = tf_messages.PredictRequest()
    request.model_spec.name = "nann"
    request.model_spec.signature_name = signature
    encode_tensor(np.zeros((rows, 3200), dtype), request.inputs["comm_seq"])
    encode_tensor(np.array([[100, 200, 200, 200, 200, 5]], np.int32), request.inputs["level_topn"])
    return request


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("signature", ["", "serving_default", "retrieve"])
async def test_predict(world: Transports, signature: str, dtype: str) -> None:
    response = await world.predict(predict_request(2, signature, dtype))
    assert decode_tensor(response.outputs["top_k"], "top_k").tolist() == [[0, 1, 2, 3, 4]] * 2
    assert ("scores" in response.outputs) == (signature == "retrieve")
    assert response.model_spec.signature_name == (signature or "serving_default")
    assert response.model_spec.version.value == 1


async def test_model_metadata_and_status(world: Transports) -> None:
    get_metadata = world.tensorflow("tensorflow.serving.PredictionService", "GetModelMetadata")
    request = tf_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "nann"
    assert "signature_def" in (await get_metadata(request)).metadata

    get_status = world.tensorflow("tensorflow.serving.ModelService", "GetModelStatus")
    request = tf_messages.GetModelStatusRequest()
    request.model_spec.name = "nann"
    (status,) = (await get_status(request)).model_version_status
    assert (status.version, status.state, status.status.error_code) == (1, 30, 0)
    for version, text in (
        (None, "Could not find any versions of model x"),
        (4, "Could not find version 4 of"),
    ):
        request.model_spec.name = "x"
        if version is not None:
            request.model_spec.version.value = version
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get_status(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert text in str(caught.value.details())


async def test_unserved_methods_of_a_served_service(world: Transports) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.raw("/tensorflow.serving.PredictionService/Classify", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_check_and_watch(tmp_path: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with Transports(tmp_path, FakeEngine()).open(load=False) as world:
        health = health_pb2_grpc.HealthStub(world.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == not_serving
        await world.registry.load()
        world.health.loaded()
        assert (await watch.read()).status == serving
        for name in ("", "nann.retrieval.v1.RetrievalService", "PredictionService", "ModelService"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == serving
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        world.health.draining()
        assert (await watch.read()).status == not_serving
        # A watcher does not hold up the drain.
        assert await asyncio.wait_for(watch.read(), PATIENCE_S) is grpc.aio.EOF


async def test_reflection_shows_the_native_service(world: Transports) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(world.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="nann.retrieval.v1.RetrievalService"),
    ]
    listed, described = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"nann.retrieval.v1.RetrievalService", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_a_port_that_is_taken(world: Transports) -> None:
    taken = world.settings.model_copy(update={"grpc_port": world.grpc_port})
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{world.grpc_port}"):
        create_server(world.service, taken, world.health, world.metrics)


@pytest.mark.slow
async def test_nanns_own_smoke_client(world: Transports) -> None:
    """The client of NANN's README, word for word but for the port."""
    pytest.importorskip("tensorflow_serving")
    if not SEED.exists():
        pytest.skip(f"NANN's README is not at {SEED}")
    readme = SEED.read_text(encoding="utf-8")
    (program,) = re.findall(
        r"```python\n(from tensorflow_serving\.apis import predict_pb2\n.*?)```", readme, re.S
    )
    assert "localhost:8500" in program
    program = program.replace("localhost:8500", f"127.0.0.1:{world.grpc_port}")
    client = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert client.returncode == 0, client.stderr
    assert client.stdout.startswith("dtype: DT_INT64\n")
    assert re.findall(r"size: (\d+)", client.stdout) == ["1", "200"]
    assert re.findall(r"int64_val: (\d+)", client.stdout) == [str(item) for item in range(200)]
