"""Calls that are refused unread: when every queue is full, and when the server is going away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from fake_engine import PATIENCE_S, FakeEngine
from transports import Transports

from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages

RETRIEVE = "/nann.retrieval.v1.RetrievalService/Retrieve"
BATCH_RETRIEVE = "/nann.retrieval.v1.RetrievalService/BatchRetrieve"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
ADMIN_KEY = "0123456789abcdef0123456789abcdef"
# Neither JSON nor a message: whoever reads it says so.
NONSENSE = b"\xff{"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # a queue tells nobody that it grew
            await asyncio.sleep(0)


@asynccontextmanager
async def full(directory: Path, **settings: Any) -> AsyncIterator[Transports]:
    """A server with one lane, which is busy, and one place in its queue, which is taken."""
    engine = FakeEngine(lanes=1)
    more = {"queue_limit": 1, "max_queries_per_call": 1, **settings}
    async with Transports(directory, engine, **more).open() as world:
        batcher = world.registry.served().batcher
        engine.gate.clear()
        query = pb.RetrieveRequest(history=pb.IdList(ids=[pb.Id(number=1)]), k=1)
        key = (("x-api-key", ADMIN_KEY),)
        asked = [asyncio.ensure_future(world.native.Retrieve(query, metadata=key))]
        assert await asyncio.to_thread(engine.searching.wait, PATIENCE_S)
        asked.append(asyncio.ensure_future(world.native.Retrieve(query, metadata=key)))
        await until(lambda: not batcher.has_room())
        try:
            yield world
        finally:
            engine.gate.set()
            for reply in await asyncio.gather(*asked):  # what waited is not touched by any of it
                assert len(reply.items) == 1


@contextmanager
def refused_by_grpc(*codes: grpc.StatusCode) -> Iterator[dict[str, str]]:
    trailer: dict[str, str] = {}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield trailer
    assert caught.value.code() in codes
    trailer |= dict(caught.value.trailing_metadata())


async def test_a_full_queue_is_said_before_the_body_is_read(tmp_path: Path) -> None:
    async with full(tmp_path) as world:
        checked = len(world.engine.checked)
        response = await world.http.post("/retrieve", content=NONSENSE, headers={"x-request-id": "mine"})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"] == "mine"
        error = response.json()["error"]
        assert (error["code"], error["request_id"]) == ("overloaded", "mine")
        assert error["message"] == "the queue is full: 1 queries are waiting"

        response = await world.http.post("/v1/models/nann:predict", content=NONSENSE)
        assert (response.status_code, set(response.json())) == (503, {"error"})

        for path in (RETRIEVE, BATCH_RETRIEVE):
            with refused_by_grpc(grpc.StatusCode.RESOURCE_EXHAUSTED) as trailer:
                await world.raw(path, NONSENSE)
            assert trailer["nann-error-code"] == "overloaded"
            assert "grpc-retry-pushback-ms" in trailer
        with refused_by_grpc(grpc.StatusCode.UNAVAILABLE):
            await world.raw(PREDICT, NONSENSE)
        assert len(world.engine.checked) == checked

        text = (await world.http.get("/metrics")).text
        assert 'nann_rejected_total{reason="queue_full"} 5.0' in text
        assert 'nann_requests_total{api="rest",code="overloaded",method="retrieve",model="nann"} 1.0' in text


async def test_a_body_that_is_never_read_leaves_its_connection_usable(tmp_path: Path) -> None:
    async with full(tmp_path) as world:
        for _ in range(3):
            response = await world.http.post("/retrieve", content=b"[" * 500_000)
            assert response.status_code == 429
        assert (await world.http.get("/livez")).status_code == 200


async def test_the_short_way_of_a_refusal_says_what_the_long_way_says(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"admin admin {ADMIN_KEY}\n")
    async with full(tmp_path, api_keys_file=keys, access_log=True) as world:
        mine = {"x-request-id": "mine", "x-api-key": ADMIN_KEY}
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
            short = await world.http.post("/retrieve", content=NONSENSE, headers=mine)
            ways = [short]
            for more, target in (({"connection": "close"}, "/retrieve"), ({}, "/retrieve?")):
                ways.append(await world.http.post(target, content=NONSENSE, headers=mine | more))
        for long in ways[1:]:
            assert (long.status_code, long.content) == (short.status_code, short.content)
            expected = {**short.headers, "date": long.headers["date"]}
            assert {**long.headers} in (expected, {**expected, "connection": "close"})
        seen = [
            {name: line[name] for name in ("event", "code", "method", "caller", "request_id")}
            for line in lines
        ]
        assert (
            seen
            == [
                {
                    "event": "request",
                    "code": "overloaded",
                    "method": "retrieve",
                    "caller": "admin",
                    "request_id": "mine",
                }
            ]
            * 3
        )
        text = (await world.http.get("/metrics", headers=mine)).text
        assert 'nann_requests_total{api="rest",code="overloaded",method="retrieve",model="nann"} 3.0' in text


async def test_pipelined_requests_are_refused_each_in_its_turn(tmp_path: Path) -> None:
    """The first of them is no search and takes the long way; the refusals behind it may not overtake it."""
    refused = b"POST /retrieve HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nx-request-id: %d\r\n\r\nabcde"
    async with full(tmp_path) as world:
        reader, writer = await asyncio.open_connection(*world.address)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n" + refused % 1 + refused % 2)
        statuses = []
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(
                    line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line
                )
                await reader.readexactly(int(fields[b"content-length"]))
                statuses.append((head.split()[1], fields[b"x-request-id"]))
            # And alone, its body in pieces.
            for n in (3, 4):
                request = refused % n
                for part in (request[:30], request[30:-2], request[-2:]):
                    writer.write(part)
                    await asyncio.sleep(0.01)
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"x-request-id: %d" % n in head
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        assert [status for status, _ in statuses] == [b"200", b"429", b"429"]
        assert [number for _, number in statuses[1:]] == [b"1", b"2"]
        writer.close()
        await writer.wait_closed()


async def test_a_full_queue_concerns_nobody_who_needs_no_lane(tmp_path: Path) -> None:
    async with full(tmp_path) as world:
        response = await world.http.post("/users/1/events", json={"item_ids": [5]})
        assert (response.status_code, response.json()["recorded"]) == (200, 1)
        assert (await world.http.get("/v1/models/nann")).status_code == 200
        assert (await world.native.GetUser(pb.GetUserRequest(user_id=pb.Id(number=1)))).n_live == 1


async def test_a_full_queue_is_no_business_of_who_may_not_ask(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"admin admin {ADMIN_KEY}\n")
    async with full(tmp_path, api_keys_file=keys) as world:
        assert (await world.http.post("/retrieve", content=NONSENSE)).status_code == 401
        assert (await world.http.post("/v1/models/nann:predict", content=NONSENSE)).status_code == 401
        with refused_by_grpc(grpc.StatusCode.UNAUTHENTICATED):
            await world.raw(RETRIEVE, NONSENSE)
        allowed = {"x-api-key": ADMIN_KEY}
        text = (await world.http.get("/metrics", headers=allowed)).text
        assert 'nann_rejected_total{reason="queue_full"} 0.0' in text  # nor counted as one
        assert (await world.http.post("/retrieve", content=NONSENSE, headers=allowed)).status_code == 429


async def test_room_in_any_queue_is_reason_to_read_on(tmp_path: Path) -> None:
    """A second version that has room; which of them the call means, only its body says."""
    engines = {1: FakeEngine(lanes=1), 2: FakeEngine(version=2, lanes=1)}
    (tmp_path / "nann" / "2").mkdir(parents=True)
    world = Transports(
        tmp_path,
        engines[1],
        load_engine=lambda path: engines[int(path.name)],
        version_policy="all",
        queue_limit=1,
        max_queries_per_call=1,
    )
    async with world.open():
        old = world.registry.served("nann", version=1).batcher
        engines[1].gate.clear()
        asked = [asyncio.ensure_future(world.http.post("/retrieve", json={"history": [1], "version": 1}))]
        assert await asyncio.to_thread(engines[1].searching.wait, PATIENCE_S)
        asked.append(asyncio.ensure_future(world.http.post("/retrieve", json={"history": [1], "version": 1})))
        await until(lambda: not old.has_room())
        assert (await world.http.post("/retrieve", json={"history": [1]})).json()["version"] == 2
        refused = await world.http.post("/retrieve", json={"history": [1], "version": 1})
        assert refused.status_code == 429
        engines[1].gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200, 200]


async def test_a_server_that_goes_away_says_so_and_asks_callers_to_leave(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with Transports(tmp_path, engine).open() as world:
        engine.gate.clear()
        accepted = asyncio.ensure_future(world.http.post("/retrieve", json={"history": [1], "k": 2}))
        assert await asyncio.to_thread(engine.searching.wait, PATIENCE_S)
        world.health.draining()
        for path in ("/retrieve", "/users/1/events", "/models/rescan"):
            response = await world.http.post(path, content=NONSENSE)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
            assert response.headers["connection"] == "close"
        assert (await world.http.get("/v1/models/nann")).json() == {"error": "the server is shutting down"}
        for path in (RETRIEVE, PREDICT):
            with refused_by_grpc(grpc.StatusCode.UNAVAILABLE) as trailer:
                await world.raw(path, NONSENSE)
            assert trailer["nann-error-code"] == "not_ready"
        engine.gate.set()
        answer = await accepted
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert len(answer.json()["items"]) == 2


async def test_a_caller_that_hangs_up_leaves_the_queue(tmp_path: Path) -> None:
    engine = FakeEngine(lanes=1)
    async with Transports(tmp_path, engine).open() as world:
        batcher = world.registry.served().batcher
        engine.gate.clear()
        first = asyncio.ensure_future(world.http.post("/retrieve", json={"history": [1]}))
        assert await asyncio.to_thread(engine.searching.wait, PATIENCE_S)
        _, writer = await asyncio.open_connection(*world.address)
        body = b'{"history": [1]}'
        writer.write(
            b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await until(lambda: batcher.depth == 1)
        writer.close()
        await until(lambda: batcher.depth == 0)
        engine.gate.set()
        assert (await first).status_code == 200
        text = (await world.http.get("/metrics")).text
        assert 'nann_requests_total{api="rest",code="cancelled",method="retrieve",model="nann"} 1.0' in text


async def test_predict_by_grpc_is_told_the_words_of_tensorflow_serving(tmp_path: Path) -> None:
    request_class, _ = tf_messages.service_methods("tensorflow.serving.PredictionService")["Predict"]
    async with full(tmp_path) as world:
        with refused_by_grpc(grpc.StatusCode.UNAVAILABLE):
            await world.predict(request_class())
