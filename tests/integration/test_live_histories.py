"""Live histories through the whole service: over both transports, through the death of store and server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import PATIENCE_S, FakeEngine
from redis_server import RedisServer
from served_process import served_process
from transports import Transports

from nann.service.pb import retrieval_pb2 as pb
from nann.service.user_store import open_user_store


@contextmanager
def _redis(directory: Path) -> Iterator[str]:
    server = RedisServer(directory)
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Transports]:
    places = {
        "memory": nullcontext("memory"),
        "sqlite": nullcontext(str(tmp_path / "users.sqlite3")),
        "redis": _redis(tmp_path),
    }
    with places[request.param] as location:
        store = await open_user_store(location, history_limit=5, timeout_s=PATIENCE_S)
        async with Transports(tmp_path, FakeEngine(), store=store).open() as opened:
            yield opened
        await store.close()


def _number(value: int) -> pb.Id:
    return pb.Id(number=value)


async def test_the_next_query_sees_the_event_whichever_way_either_came(world: Transports) -> None:
    async def seen_over_rest() -> list[int]:
        await world.http.post("/retrieve", json={"user_id": 1, "k": 3})
        return list(world.engine.checked[-1].history or ())

    async def seen_over_grpc() -> list[int]:
        await world.native.Retrieve(pb.RetrieveRequest(user_id=_number(1), k=3))
        return list(world.engine.checked[-1].history or ())

    assert await seen_over_rest() == await seen_over_grpc() == [10, 11, 12]
    response = await world.http.post("/users/1/events", json={"item_ids": [5, 6]})
    assert response.json() == {"user_id": 1, "recorded": 2}
    assert await seen_over_rest() == await seen_over_grpc() == [10, 11, 12, 5, 6]
    reply = await world.native.RecordEvents(pb.RecordEventsRequest(user_id=_number(1), item_ids=[_number(7)]))
    assert reply.recorded == 1
    assert await seen_over_rest() == await seen_over_grpc() == [10, 11, 12, 5, 6, 7]
    for item in (8, 9, 10):
        await world.http.post("/users/1/events", json={"item_ids": [item]})
    user = (await world.http.get("/users/1")).json()
    assert (user["history"], user["n_base"], user["n_live"]) == ([10, 11, 12, 6, 7, 8, 9, 10], 3, 5)
    assert [
        i.number for i in (await world.native.GetUser(pb.GetUserRequest(user_id=_number(1)))).history
    ] == (user["history"])
    await world.native.DeleteUser(pb.DeleteUserRequest(user_id=_number(1)))
    assert (await world.http.get("/users/1")).status_code == 404
    assert (await world.http.post("/retrieve", json={"user_id": 1})).status_code == 404
    await world.http.post("/users/1/events", json={"item_ids": [4]})
    assert await seen_over_rest() == await seen_over_grpc() == [4]


async def test_each_query_of_a_batch_sees_its_own_user(world: Transports) -> None:
    await world.http.post("/users/77/events", json={"item_ids": [3, 4]})
    queries = [{"user_id": 77}, {"user_id": 1}, {"user_id": 78}, {"user_id": "77"}, {"history": [9]}]
    results = (await world.http.post("/retrieve", json={"queries": queries})).json()["results"]
    assert [result.get("error", {}).get("code") for result in results] == [
        *(None, None, "unknown_user", None, None)
    ]
    asked = [list(query.history or ()) for query in world.engine.checked]
    assert asked == [[3, 4], [10, 11, 12], [3, 4], [9]]


async def _retrieve(client: httpx.AsyncClient, **query: Any) -> httpx.Response:
    return await client.post("/retrieve", json={"k": 3, **query})


async def test_an_outage_of_redis_harms_only_live_histories_and_ends_by_itself(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    try:
        with served_process(tmp_path, user_store=redis.url) as server:
            async with httpx.AsyncClient(base_url=server.rest_url, timeout=PATIENCE_S) as client:
                await _outage(client, redis)
    finally:
        redis.stop()


async def _outage(client: httpx.AsyncClient, redis: RedisServer) -> None:
    async def record(user: int, item: int) -> None:
        # On a machine at work Redis may take longer than the store waits, which is no outage.
        while (await client.post(f"/users/{user}/events", json={"item_ids": [item]})).status_code == 503:
            pass

    await asyncio.wait_for(asyncio.gather(record(1, 5), record(77, 6)), PATIENCE_S)
    assert (await _retrieve(client, user_id=1)).json()["notes"] == []
    redis.kill()
    for _ in range(5):
        by_user, live_only, by_history = await asyncio.gather(
            _retrieve(client, user_id=1), _retrieve(client, user_id=77), _retrieve(client, history=[1])
        )
        assert (by_user.status_code, live_only.status_code, by_history.status_code) == (200, 503, 200)
        assert [note["code"] for note in by_user.json()["notes"]] == ["live_history_missing"]
        assert (live_only.json()["error"]["code"], by_history.json()["notes"]) == ("unavailable", [])
        assert (await client.post("/users/1/events", json={"item_ids": [9]})).status_code == 503
        assert (await client.get("/users/1")).status_code == 503
        assert (await client.get("/readyz")).status_code == 200  # one more replica would not help
    redis.start()

    async def until_it_is_back() -> None:
        while (await client.get("/users/1")).status_code == 503:
            pass

    await asyncio.wait_for(until_it_is_back(), PATIENCE_S)
    assert (await client.get("/users/1")).json()["history"] == [10, 11, 12, 5]
    assert (await _retrieve(client, user_id=1)).json()["notes"] == []
    assert (await _retrieve(client, user_id=77)).status_code == 200
    assert (await client.post("/users/1/events", json={"item_ids": [9]})).status_code == 200


async def test_the_outage_of_redis_can_be_made_an_error(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    redis.kill()
    with served_process(tmp_path, user_store=redis.url, user_store_failure="error") as server:
        async with httpx.AsyncClient(base_url=server.rest_url, timeout=PATIENCE_S) as client:
            assert (await _retrieve(client, user_id=1)).status_code == 503
            assert (await _retrieve(client, history=[1])).status_code == 200
        async with grpc.aio.insecure_channel(server.grpc_url.removeprefix("grpc://")) as channel:
            call = channel.unary_unary("/nann.retrieval.v1.RetrievalService/Retrieve")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(pb.RetrieveRequest(user_id=_number(1)).SerializeToString())
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_kill_9_of_the_server_loses_no_acknowledged_event(kind: str, tmp_path: Path) -> None:
    """Four clients write one event after another until the server dies under them."""
    acknowledged: dict[int, int] = dict.fromkeys(range(4), 0)
    enough = asyncio.Event()

    async def write(client: httpx.AsyncClient, user: int) -> None:
        while True:
            event = {"item_ids": [acknowledged[user]]}
            try:
                response = await client.post(f"/users/{100 + user}/events", json=event)
            except httpx.TransportError:
                return
            assert response.status_code == 200, response.text
            acknowledged[user] += 1
            if sum(acknowledged.values()) >= 200:
                enough.set()

    with nullcontext("") if kind == "sqlite" else _redis(tmp_path) as location:
        settings = {"user_history_limit": 100_000} | ({"user_store": location} if location else {})
        with served_process(tmp_path, **settings) as server:
            async with httpx.AsyncClient(base_url=server.rest_url, timeout=PATIENCE_S) as client:
                writers = [asyncio.create_task(write(client, user)) for user in acknowledged]
                await asyncio.wait_for(enough.wait(), PATIENCE_S)
                await asyncio.to_thread(server.kill)
                await asyncio.gather(*writers)
        assert all(acknowledged.values())
        with served_process(tmp_path, **settings) as server:
            async with httpx.AsyncClient(base_url=server.rest_url, timeout=PATIENCE_S) as client:
                for user, count in acknowledged.items():
                    history = (await client.get(f"/users/{100 + user}")).json()["history"]
                    assert history == list(range(len(history)))
                    # One more may be there: stored, and the server died before it could say so.
                    assert len(history) in (count, count + 1)
