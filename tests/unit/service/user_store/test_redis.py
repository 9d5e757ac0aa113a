"""What only a store behind a network has to show; the rest is in tests/contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import PATIENCE_S, ManualTime
from redis.asyncio import Redis
from redis_server import RedisServer

from nann.service.user_store import LiveHistory
from nann.service.user_store.redis import RedisUserStore

LIMIT = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    yield started
    started.stop()


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisUserStore]:
    opened = await RedisUserStore.open(server.url, history_limit=LIMIT, timeout_s=PATIENCE_S)
    await opened._client.flushall()  # type: ignore[no-untyped-call]
    yield opened
    await opened.close()


async def _commands(client: Redis) -> dict[str, int]:
    stats: dict[str, Any] = await client.info("commandstats")  # type: ignore[no-untyped-call]
    return {name.removeprefix("cmdstat_"): value["calls"] for name, value in stats.items()}


async def test_a_batch_is_one_round_trip(store: RedisUserStore) -> None:
    for user in ("a", "b", "c"):
        await store.append(user, [1])
    await store._client.config_resetstat()  # type: ignore[no-untyped-call]
    await store.get_many(["a", "b", "c", "nobody"])
    await store.append("a", [2, 3, 4])
    await store.delete("b")
    counts = await _commands(store._client)
    sent = {name: n for name, n in counts.items() if name in ("mget", "eval")}
    assert sent == {"mget": 1, "eval": 1}
    assert set(counts) - {"info", "config|resetstat"} == {
        "mget",
        "eval",
        "get",
        "set",
    }  # two are the script's


async def test_users_share_no_key_with_other_programs(store: RedisUserStore) -> None:
    await store.append("u", [1])
    assert await store._client.keys() == [b"nann:1:history:u"]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [b"", b"1,2", b"?\n1"])
async def test_a_foreign_value_is_told_and_not_guessed(store: RedisUserStore, value: bytes) -> None:
    await store._client.set("nann:1:history:u", value)
    with pytest.raises(OSError, match="another program"):
        await store.get_many(["u"])


async def test_a_smaller_limit_holds_for_what_was_stored_under_a_larger_one(
    store: RedisUserStore, server: RedisServer
) -> None:
    await store.append("u", [1, 2, 3, 4, 5])
    await store.append("v", [1, 2, 3, 4, 5])
    smaller = await RedisUserStore.open(server.url, history_limit=2, timeout_s=PATIENCE_S)
    assert await smaller.get_many(["u"]) == [LiveHistory((4, 5))]
    await smaller.append("v", [6])
    assert await store.get_many(["v"]) == [LiveHistory((5, 6))]
    await smaller.close()


async def test_a_caller_who_gives_up_leaves_no_answer_for_the_next(
    store: RedisUserStore, server: RedisServer
) -> None:
    await store.append("mine", [1])
    await store.append("yours", [2])
    server.suspend()
    abandoned = asyncio.create_task(store.get_many(["yours"]))
    for _ in range(200):  # until the command is on its way, and the answer is waited for
        await asyncio.sleep(0)
    assert store._client.connection_pool._in_use_connections
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    server.resume()
    assert await store.get_many(["mine"]) == [LiveHistory((1,))]


async def test_a_refusal_stores_nothing_and_is_no_outage(store: RedisUserStore) -> None:
    await store.append("u", [1])
    await store._client.config_set("maxmemory", "1")  # type: ignore[no-untyped-call]
    try:
        for _ in range(4):
            with pytest.raises(OSError, match="maxmemory"):
                await store.append("u", [2])
        assert await store.get_many(["u"]) == [LiveHistory((1,))]
    finally:
        await store._client.config_set("maxmemory", "0")  # type: ignore[no-untyped-call]


async def test_acknowledged_events_survive_kill_9_and_the_store_comes_back_by_itself(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    time = ManualTime()
    store = await RedisUserStore.open(server.url, history_limit=1000, timeout_s=PATIENCE_S)
    store._clock = time.clock
    try:
        for n in range(50):
            await store.append("u", [n])
        await asyncio.gather(*(store.get_many(["u"]) for _ in range(8)))  # several connections to lose
        server.kill()
        for _ in range(5):
            with pytest.raises(OSError, match="user store"):
                await store.get_many(["u"])
            with pytest.raises(OSError, match="user store"):
                await store.append("u", [-1])
        server.start()
        time.advance(1.0)
        assert await store.get_many(["u"]) == [LiveHistory(tuple(range(50)))]
        for n in range(50, 60):
            await store.append("u", [n])
        found = await asyncio.gather(*(store.get_many(["u"]) for _ in range(8)))
        assert found == [[LiveHistory(tuple(range(60)))]] * 8
    finally:
        await store.close()
        server.stop()


async def test_a_start_during_an_outage_waits_for_nothing(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.kill()
    store = await RedisUserStore.open(server.url, history_limit=LIMIT, timeout_s=PATIENCE_S)
    with pytest.raises(OSError, match="user store"):
        await store.get_many(["u"])
    server.start()
    await store.append("u", [1])
    assert await store.get_many(["u"]) == [LiveHistory((1,))]
    await store.close()
    server.stop()


async def test_a_store_that_hangs_is_asked_once_in_a_while(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    time = ManualTime()
    store = await RedisUserStore.open(server.url, history_limit=LIMIT, timeout_s=0.05)
    store._clock = time.clock
    try:
        server.suspend()
        for _ in range(3):
            with pytest.raises(OSError, match="imeout"):
                await store.get_many(["u"])
        with pytest.raises(OSError, match="imeout"):  # the first of a second tries for all the others
            await store.get_many(["u"])
        for _ in range(3):
            with pytest.raises(OSError, match="not asked"):
                await store.get_many(["u"])
        server.resume()
        time.advance(1.0)
        store._client.connection_pool.connection_kwargs["socket_timeout"] = PATIENCE_S
        assert await store.get_many(["u"]) == [LiveHistory()]
        assert await store.get_many(["u"]) == [LiveHistory()]
    finally:
        await store.close()
        server.stop()


async def test_calls_beyond_the_connections_wait_for_one(store: RedisUserStore) -> None:
    await store.append("u", [1])
    found = await asyncio.gather(*(store.get_many(["u"]) for _ in range(200)))
    assert found == [[LiveHistory((1,))]] * 200
    assert (await store._client.info("clients"))["connected_clients"] <= 33  # type: ignore[no-untyped-call]


async def test_a_wrong_password_is_told_without_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "hunter2")
    right = await RedisUserStore.open(
        f"redis://:hunter2@127.0.0.1:{server.port}", history_limit=LIMIT, timeout_s=PATIENCE_S
    )
    wrong = await RedisUserStore.open(
        f"redis://:guess3@127.0.0.1:{server.port}", history_limit=LIMIT, timeout_s=PATIENCE_S
    )
    await right.append("u", [1])
    with pytest.raises(OSError, match="password") as told:
        await wrong.get_many(["u"])
    assert "guess3" not in str(told.value)
    await right.close()
    await wrong.close()
    server.stop()


@pytest.mark.parametrize(
    "url", ["redis://host:port", "redis://host?socket_timeout=soon", "redis://host?no_such_option=1"]
)
async def test_a_wrong_url_is_told_at_start(url: str) -> None:
    with pytest.raises(OSError, match="not a URL of Redis"):
        await RedisUserStore.open(url, history_limit=LIMIT, timeout_s=PATIENCE_S)


async def test_tls_is_used_and_certificates_are_checked() -> None:
    store = await RedisUserStore.open("rediss://127.0.0.1:1", history_limit=LIMIT, timeout_s=PATIENCE_S)
    connection = store._client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    assert type(connection).__name__ == "SSLConnection"
    assert (connection.cert_reqs, connection.check_hostname) == (2, True)
    await store.close()
