"""What a caller may cost before there is a request: connections, heads, patience; over both transports."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import nann_client as nc
import pytest
from fake_engine import PATIENCE_S, FakeEngine
from transports import Transports

from nann.service.grpc_api.server import _RESERVED_CALLS
from nann.service.http_api.connection import _RESERVED
from nann.service.pb import retrieval_pb2 as pb

MAX_HEADER = 2048
MAX_CONNECTIONS = 8
MAX_CALLS = 20  # more than connections: many calls share one
CLIENT_TIMEOUT_S = 0.3
HEALTH, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
RETRIEVE = "/nann.retrieval.v1.RetrievalService/Retrieve"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
HEAD = b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    limits = {
        "max_header_bytes": MAX_HEADER,
        "max_connections": MAX_CONNECTIONS,
        "client_timeout_s": CLIENT_TIMEOUT_S,
        "max_grpc_calls": MAX_CALLS,
    }
    async with Transports(tmp_path, FakeEngine(), **limits).open() as opened:
        yield opened


async def connect(world: Transports) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*world.address)


async def exchange(world: Transports, content: bytes) -> tuple[int, Any]:
    """Status (0: closed without a word) and JSON of what comes until the server closes."""
    reader, writer = await connect(world)
    writer.write(content)
    answer = await until_closed(reader)
    writer.close()
    if not answer:
        return 0, None
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "content",
    [
        HEAD + b"X: " + b"x" * MAX_HEADER + b"\r\n\r\n",
        HEAD + b"X: x\r\n" * MAX_HEADER + b"\r\n",
        b"GET /" + b"x" * MAX_HEADER + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        # never complete
        HEAD + b"X: " + b"x" * 2 * MAX_HEADER,
        b"GET /" + b"x" * 2 * MAX_HEADER,
    ],
    ids=range(5),
)
async def test_a_head_is_bounded(world: Transports, content: bytes) -> None:
    status, body = await exchange(world, content)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


async def test_a_head_that_grows_slowly_is_bounded_too(world: Transports) -> None:
    reader, writer = await connect(world)
    writer.write(HEAD + b"X: ")
    for _ in range(10):
        writer.write(b"x" * 200)
        await asyncio.sleep(0)
    writer.write(b"x" * 48)  # one too many, and nothing after it that would reset the connection
    assert b" 431 " in await until_closed(reader)
    writer.close()


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on a plain port
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: -1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(7),
)
async def test_what_is_no_http_is_refused_in_our_own_form(world: Transports, content: bytes) -> None:
    status, body = await exchange(world, content)
    assert (status, body["error"]["code"]) == (400, "malformed_http")
    assert set(body["error"]) == {"code", "message", "request_id"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{"],
    ids=["nothing", "blank lines", "half a head", "half a body"],
)
async def test_who_does_not_go_on_is_cut_off(world: Transports, content: bytes) -> None:
    assert await exchange(world, content) == (0, None)


async def test_who_waits_for_an_answer_is_not_cut_off(world: Transports) -> None:
    world.engine.gate.clear()
    asked = asyncio.create_task(world.http.post("/retrieve", json={"history": [10]}))
    await asyncio.sleep(3 * CLIENT_TIMEOUT_S)
    world.engine.gate.set()
    assert (await asked).status_code == 200
    await asyncio.sleep(2 * CLIENT_TIMEOUT_S)
    # A connection that is kept alive has the keep-alive's time.
    assert (await world.http.post("/retrieve", json={"history": [10]})).status_code == 200


async def test_who_does_not_read_is_cut_off(world: Transports) -> None:
    reader, writer = await connect(world)
    transport: Any = writer.transport
    transport.pause_reading()
    body = json.dumps({"queries": [{"history": [10], "k": 1000}] * 64}).encode()
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    writer.write(one * 30)  # answers of 3 MB each: more than the sockets hold
    await asyncio.sleep(4 * CLIENT_TIMEOUT_S)
    await asyncio.wait_for(_until_no_connection(world), PATIENCE_S)
    writer.close()
    del reader


async def _until_no_connection(world: Transports) -> None:
    while world.server.server_state.connections:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.05)


async def test_requests_sent_ahead_are_bounded(world: Transports) -> None:
    world.engine.gate.clear()
    body = b'{"history": [10]}'
    status, answer = await exchange(world, (HEAD + b"Content-Length: 17\r\n\r\n" + body) * 200)
    world.engine.gate.set()
    assert (status, answer["error"]["code"]) == (400, "malformed_http")


async def test_connections_are_bounded(world: Transports) -> None:
    held = [await connect_and_ask(world) for _ in range(MAX_CONNECTIONS)]
    status, body = await exchange(world, HEAD + b"Content-Length: 2\r\n\r\n{}")
    assert (status, body["error"]["code"]) == (503, "too_many_connections")
    held[0][1].close()
    await asyncio.wait_for(_until_connections(world, MAX_CONNECTIONS - 1), PATIENCE_S)
    reader, writer = await connect(world)
    writer.write(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
    assert b" 422 " in await until_closed(reader)
    for _, other in (*held, (reader, writer)):
        other.close()


@pytest.mark.parametrize("path", ["/livez", "/readyz?verbose", "/healthz", "/metrics"])
async def test_probes_are_answered_when_callers_hold_every_connection(world: Transports, path: str) -> None:
    held = [await connect_and_ask(world) for _ in range(MAX_CONNECTIONS)]
    for _ in range(3 * _RESERVED):
        reader, writer = await connect(world)
        writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        answer = await until_closed(reader)  # it is not kept alive
        assert b" 200 " in answer.split(b"\r\n", 1)[0]
        writer.close()
    for _, other in held:
        other.close()


async def test_connections_held_beyond_the_reserve_are_closed_unheard(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine(), max_connections=MAX_CONNECTIONS).open() as world:
        held = [await connect(world) for _ in range(MAX_CONNECTIONS + _RESERVED)]
        await asyncio.wait_for(_until_connections(world, len(held)), PATIENCE_S)
        assert (await exchange(world, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 0
        assert world.metrics.registry.get_sample_value("nann_connections_refused_total") == 1
        for _, other in held:
            other.close()


async def connect_and_ask(world: Transports) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that is kept alive after an answer."""
    reader, writer = await connect(world)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 200 " in await reader.readline()
    return reader, writer


async def _until_connections(world: Transports, n: int) -> None:
    while len(world.server.server_state.connections) != n:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.01)


async def code_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_metadata_is_bounded(world: Transports) -> None:
    retrieve = world.channel.unary_unary(RETRIEVE)
    assert await code_of(retrieve(b"\xff", metadata=(("x", "x" * 500),))) == "INVALID_ARGUMENT"
    assert await code_of(retrieve(b"\xff", metadata=(("x", "x" * MAX_HEADER),))) == "RESOURCE_EXHAUSTED"


async def test_compressed_messages_are_refused(world: Transports) -> None:
    request = pb.RetrieveRequest(history=pb.IdList(ids=[pb.Id(number=10)] * 1000), k=1)
    content = request.SerializeToString()
    compressed = world.channel.unary_unary(RETRIEVE)(content, compression=grpc.Compression.Gzip)
    assert await code_of(compressed) == "UNIMPLEMENTED"
    assert await code_of(world.channel.unary_unary(RETRIEVE)(content)) == "OK"


async def test_compressed_bodies_are_refused(world: Transports) -> None:
    for coding, status in (("gzip", 415), ("br", 415), ("identity", 200)):
        response = await world.http.post(
            "/retrieve", json={"history": [10]}, headers={"content-encoding": coding}
        )
        assert response.status_code == status


async def test_calls_in_progress_are_bounded(world: Transports) -> None:
    world.engine.gate.clear()
    request = pb.RetrieveRequest(history=pb.IdList(ids=[pb.Id(number=10)])).SerializeToString()
    retrieve = world.channel.unary_unary(RETRIEVE)
    calls = [asyncio.ensure_future(code_of(retrieve(request))) for _ in range(MAX_CALLS)]
    await asyncio.wait_for(_until_searching(world, MAX_CALLS), PATIENCE_S)
    refused = retrieve(request)
    assert await code_of(refused) == "RESOURCE_EXHAUSTED"
    trailer = dict(await refused.trailing_metadata())
    assert trailer["nann-error-code"] == "overloaded"
    assert int(trailer["grpc-retry-pushback-ms"]) > 0
    # Who asks for health is heard, and so is a watcher, which holds a place for as long as it likes.
    assert await code_of(world.channel.unary_unary(HEALTH)(b"", timeout=PATIENCE_S)) == "OK"
    world.engine.gate.set()
    assert set(await asyncio.gather(*calls)) == {"OK"}
    assert await code_of(retrieve(request)) == "OK"


async def _until_searching(world: Transports, n: int) -> None:
    while len(world.engine.checked) < n:  # noqa: ASYNC110  # an engine has no event for it
        await asyncio.sleep(0.01)


async def test_calls_far_above_the_limit_are_refused_by_grpc_as_overload_too(world: Transports) -> None:
    world.engine.gate.clear()
    target = f"127.0.0.1:{world.grpc_port}"
    n = MAX_CALLS + _RESERVED_CALLS
    watchers = [grpc.aio.insecure_channel(target, OWN_CONNECTION) for _ in range(2)]
    watches = [watchers[i % 2].unary_stream(WATCH)(b"") for i in range(n)]
    for watch in watches:
        assert await watch.read()
    client = nc.Client(f"grpc://{target}", timeout_s=PATIENCE_S, retry=nc.RetryPolicy(max_attempts=1))
    with pytest.raises(nc.Overloaded):
        await asyncio.to_thread(client.retrieve, nc.Query(history=[10], k=1))
    client.close()
    world.engine.gate.set()
    for watch in watches:
        watch.cancel()
    for channel in watchers:
        await channel.close()


async def test_a_call_that_nobody_reads_for_a_while_is_not_cancelled(tmp_path: Path) -> None:
    """As in an overload, or when the event loop stands still; CANCELLED would not say: try again."""
    n_calls = 1500  # by default gRPC begins to end them above 1,000
    async with Transports(tmp_path, FakeEngine(), max_grpc_calls=2 * n_calls).open() as world:
        with grpc.insecure_channel(f"127.0.0.1:{world.grpc_port}") as channel:
            ready = grpc.channel_ready_future(channel)
            await asyncio.to_thread(ready.result, PATIENCE_S)
            ask = channel.unary_unary(RETRIEVE)
            calls = [ask.future(b"no message", timeout=PATIENCE_S) for _ in range(n_calls)]
            time.sleep(1.0)  # noqa: ASYNC251  # nobody reads
            codes = await asyncio.to_thread(lambda: {call.code() for call in calls})
    assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_grpc_connections_are_bounded(world: Transports) -> None:
    target = f"127.0.0.1:{world.grpc_port}"
    channels = [grpc.aio.insecure_channel(target, OWN_CONNECTION) for _ in range(MAX_CONNECTIONS + 4)]
    codes = [
        await code_of(channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=2))
        for channel in channels
    ]
    for channel in channels:
        await channel.close()
    assert codes[:MAX_CONNECTIONS] == ["OK"] * MAX_CONNECTIONS
    assert set(codes[MAX_CONNECTIONS:]) == {"UNAVAILABLE"}
