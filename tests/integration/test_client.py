"""The client package against the real service: each call over both transports, waiting and awaited."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nann_client as nc
import numpy as np
import pytest
from fake_engine import PATIENCE_S, FakeEngine
from transports import Transports

from nann.engine.errors import BackendError

KINDS = ("rest", "grpc")


class Caller:
    """One client behind one face: `await caller.retrieve(...)` whether it waits or is awaited."""

    def __init__(self, url: str, *, is_async: bool, **options: Any) -> None:
        self._client: Any = (nc.AsyncClient if is_async else nc.Client)(url, **options)
        self._is_async = is_async

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if self._is_async:
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(method, *args, **kwargs)

        return call

    def within(self, timeout_s: float) -> Caller:
        other = object.__new__(Caller)
        other._client, other._is_async = self._client.within(timeout_s), self._is_async
        return other


def url_of(world: Transports, kind: str) -> str:
    if kind == "rest":
        return f"http://127.0.0.1:{world.address[1]}"
    return f"grpc://127.0.0.1:{world.grpc_port}"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    async with Transports(tmp_path, FakeEngine()).open() as opened:
        yield opened


@pytest.fixture(params=[f"{kind}-{how}" for kind in KINDS for how in ("sync", "async")])
async def client(request: pytest.FixtureRequest, world: Transports) -> AsyncIterator[Caller]:
    kind, how = request.param.split("-")
    caller = Caller(url_of(world, kind), is_async=how == "async", timeout_s=PATIENCE_S)
    yield caller
    await caller.close()


async def test_a_reply_is_the_same_over_every_transport(client: Caller) -> None:
    reply = await client.retrieve(nc.Query(history=[0, 4, 12345], k=3, explain=True))
    assert [(item.item_id, item.score) for item in reply.items] == [(1, 0.0), (2, -1.0), (3, -2.0)]
    assert reply.items[0].attributes == {"title": "title of 1"}
    assert (reply.model, reply.version, reply.n_scored) == ("nann", 1, 100)
    assert reply.notes == (nc.Note("unknown_history_items", "skipped", 1),)
    assert {"steps": 3, "policy": "best_first"}.items() <= reply.explain.items()
    assert {"queue", "search", "total"} == set(reply.timings_ms)
    assert len(reply.request_id) == 32


QUERIES = [
    nc.Query(user_id=1),
    nc.Query(history=[]),
    nc.Query(history=(np.int64(5), 7), include_ids=[1, 2, 3], exclude_ids=[2]),
    nc.Query(user_id=2, exclude_seen=False, with_attributes=False, profile="fast", model="nann", version=1),
    nc.Query(comm_seq=np.ones((50, 64), np.float16), k=4, params=nc.SearchParams(level_topn=[9] * 6)),
    nc.Query(user_id=1, params=nc.SearchParams(policy="best_first", ef=50, beam_width=8, max_steps=9)),
    nc.Query(user_id=1, filter={"a": 1, "b": {"in": ["x", 2.5, True]}, "c": {"ne": None}}, strict=True),
]


async def test_the_server_is_asked_what_the_query_says_over_every_transport(world: Transports) -> None:
    """The engine gets the same query, whichever way it came."""
    for query in QUERIES:
        asked: list[Any] = []
        for kind in KINDS:
            caller = Caller(url_of(world, kind), is_async=True, timeout_s=PATIENCE_S)
            world.engine.checked.clear()
            reply = await caller.retrieve(query)
            (only,) = world.engine.checked
            sequence = None if only.comm_seq is None else only.comm_seq.tolist()
            seen = [list(getattr(only, name) or ()) for name in ("history", "seen", "include", "exclude")]
            asked.append(
                (
                    *(replace(only, comm_seq=None, history=None, seen=(), include=None, exclude=()), seen),
                    *(sequence, [item.item_id for item in reply.items], len(reply.items)),
                )
            )
            await caller.close()
        assert asked[0] == asked[1]


async def test_a_batch_keeps_order_and_each_query_has_its_own_error(client: Caller) -> None:
    queries = [
        nc.Query(user_id=1, k=1),
        nc.Query(user_id=404),
        nc.Query(history=[1], k=0),
        nc.Query(user_id=2),
    ]
    first, unknown, invalid, last = await client.retrieve_many(queries)
    assert [item.item_id for item in first.items] == [0]
    assert isinstance(unknown, nc.UnknownUser) and unknown.code == "unknown_user"
    assert isinstance(invalid, nc.InvalidQuery) and "k must be" in invalid.message
    assert len(last.items) == 200
    with pytest.raises(nc.InvalidQuery, match="1 to 64 queries"):
        await client.retrieve_many([])


async def test_users(client: Caller) -> None:
    await _users(client, 7)


async def test_users_whose_names_need_escaping(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine(user_id_type="str")).open() as world:
        for kind in KINDS:
            caller = Caller(url_of(world, kind), is_async=True, timeout_s=PATIENCE_S)
            for user in ("x y/é?", "..", ".", "a/events", "%2F", "007"):
                await _users(caller, user)
            await caller.close()


async def _users(client: Caller, user: nc.Id) -> None:
    assert await client.record_events(user, [3, np.int32(4)]) == 2
    assert await client.user(user) == nc.User(user, (3, 4), 0, 2)
    await client.delete_user(user)
    with pytest.raises(nc.UnknownUser) as unknown:
        await client.user(user, model="nann")
    assert unknown.value.request_id
    with pytest.raises(nc.UnknownUser):
        await client.delete_user(user)


async def test_string_ids_stay_strings(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine(item_id_type="str", user_id_type="str")).open() as world:
        for kind in KINDS:
            caller = Caller(url_of(world, kind), is_async=False, timeout_s=PATIENCE_S)
            reply = await caller.retrieve(nc.Query(history=["item0"], k=1))
            assert reply.items[0].item_id == "item1"
            await caller.close()


async def test_model_status(client: Caller) -> None:
    state = nc.VersionStatus(1, "AVAILABLE", "OK", "")
    assert await client.model_status("nann") == await client.model_status("nann", version=1) == [state]
    for name, version in (("x", None), ("nann", 7)):
        with pytest.raises(nc.NotFound, match="Could not find"):
            await client.model_status(name, version=version)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (nc.Query(user_id=404), nc.UnknownUser),
        (nc.Query(user_id=1, model="x"), nc.UnknownModel),
        (nc.Query(user_id=1, version=9), nc.UnknownVersion),
        (nc.Query(user_id=1, k=0), nc.InvalidQuery),
        (nc.Query(user_id=1, filter={"a": object()}), nc.InvalidQuery),
        (nc.Query(history=[1.5]), nc.InvalidQuery),  # type: ignore[list-item]
        (nc.Query(history=[2**64]), nc.InvalidQuery),
        (nc.Query(comm_seq=[[float("nan")] * 64] * 50), nc.InvalidQuery),
    ],
)
async def test_errors_have_the_servers_names(
    query: nc.Query, error: type[nc.NannError], client: Caller
) -> None:
    with pytest.raises(error) as raised:
        await client.retrieve(query)
    assert type(raised.value) is error
    assert raised.value.code


async def test_a_failing_engine_is_tried_again_and_then_told(client: Caller, world: Transports) -> None:
    world.engine.search_error = BackendError("the device is lost")
    with pytest.raises(nc.BackendError, match="lost"):
        await client.retrieve(nc.Query(history=[1]))
    assert len(world.engine.batches) >= 1


async def test_a_server_that_loads_is_not_ready(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine()).open(load=False) as world:
        for kind in KINDS:
            caller = Caller(url_of(world, kind), is_async=True, retry=nc.RetryPolicy(max_attempts=1))
            with pytest.raises(nc.NotReady):
                await caller.retrieve(nc.Query(history=[1]))
            await caller.close()


async def test_the_time_is_told_to_the_server_which_stops_in_time(client: Caller, world: Transports) -> None:
    world.engine.gate.clear()
    with pytest.raises(nc.DeadlineExceeded):
        await client.within(0.2).retrieve(nc.Query(history=[1]))
    world.engine.gate.set()
    assert len((await client.retrieve(nc.Query(history=[1], k=2))).items) == 2


async def test_calls_share_connections_and_a_client_may_be_shared(client: Caller) -> None:
    replies = await asyncio.gather(*(client.retrieve(nc.Query(history=[n], k=1)) for n in range(40)))
    assert {reply.items[0].item_id for reply in replies} <= {0, 1}


async def test_headers_go_with_every_call(world: Transports) -> None:
    for kind in KINDS:
        for is_async in (False, True):
            caller = Caller(url_of(world, kind), is_async=is_async, headers={"X-Request-Id": "mine-1"})
            assert (await caller.retrieve(nc.Query(history=[1], k=1))).request_id == "mine-1"
            await caller.close()


async def test_a_credential_goes_with_every_call(tmp_path: Path) -> None:
    keys, key = tmp_path / "keys", "correct-horse-battery-staple"
    keys.write_text(f"shop read {key}\n", encoding="utf-8")
    keys.chmod(0o600)
    async with Transports(tmp_path / "models", FakeEngine(), api_keys_file=keys).open() as world:
        for kind in KINDS:
            known = Caller(
                url_of(world, kind),
                is_async=True,
                headers={"Authorization": f"Bearer {key}"},
                timeout_s=PATIENCE_S,
            )
            assert len((await known.retrieve(nc.Query(user_id=1, k=2))).items) == 2
            with pytest.raises(nc.PermissionDenied):
                await known.record_events(1, [2])
            stranger = Caller(url_of(world, kind), is_async=True, timeout_s=PATIENCE_S)
            with pytest.raises(nc.Unauthenticated):
                await stranger.retrieve(nc.Query(user_id=1))
            await known.close()
            await stranger.close()


def test_it_needs_neither_tensorflow_nor_the_server_and_lives_beside_it() -> None:
    alone = (
        "import sys, nann_client, nann_client.channels; "
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'nann', 'tensorflow', 'numpy', 'pydantic'}))"
    )
    beside = (
        "import nann_client.channels, nann.service.pb.retrieval_pb2 as pb, nann.service.wire.tf_messages; "
        "from nann_client.pb import method_types; "
        "request = method_types('nann.retrieval.v1.RetrievalService', 'Retrieve')[0](k=3); "
        "print(pb.RetrieveRequest.FromString(request.SerializeToString()).k)"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for program in (alone, beside)
    ]
    assert outputs == ["[]\n", "3\n"]
