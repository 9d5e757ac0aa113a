"""The client against servers that refuse, break off, hang and talk nonsense, on real ports."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import grpc
import nann_client as nc
import pytest
from fake_engine import PATIENCE_S
from nann_client import operations
from nann_client.pb import RETRIEVAL_SERVICE, method_types

QUERY = nc.Query(user_id=1)
FAST = nc.RetryPolicy(max_attempts=3, first_delay_s=1e-3, max_delay_s=1e-3)
REPLY = {"items": [], "model": "nann", "version": 1, "n_scored": 0, "timings_ms": {}, "notes": []}


def http(status: int, body: Any, **headers: str) -> bytes:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def refusal(status: int, code: str, **headers: str) -> bytes:
    return http(status, {"error": {"code": code, "message": "no", "request_id": "r1"}}, **headers)


OK = http(200, REPLY)
DROP = b""  # closes the connection without a word
HANG = b"hang"


class Scripted:
    """Answers one request after another as it was told; `requests` are what came."""

    def __init__(self, script: Sequence[bytes]) -> None:
        self._script = list(script)
        self.requests: list[str] = []
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.I)
                await reader.readexactly(int(length[1]) if length else 0)
                self.requests.append(head.split("\r\n")[0])
                answer = self._script.pop(0)
                if answer == HANG:
                    await reader.read()  # until the caller hangs up
                    break
                writer.write(answer)
                if answer == DROP:
                    break
        self._open.discard(writer)
        writer.close()

    def hang_up(self) -> None:
        """Close every connection, as a server does with those that idle."""
        for writer in self._open:
            writer.close()


@asynccontextmanager
async def scripted(*script: bytes) -> AsyncIterator[tuple[str, Scripted]]:
    server = Scripted(script)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        listener.close()
        server.hang_up()


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`await run(url, operation)` through a fresh client of either kind."""

    async def run_async(url: str, operation: Any, timeout_s: float = PATIENCE_S) -> Any:
        async with nc.AsyncClient(url, timeout_s=timeout_s, retry=FAST) as client:
            return await client.run(operation)

    def run_sync(url: str, operation: Any, timeout_s: float = PATIENCE_S) -> Any:
        with nc.Client(url, timeout_s=timeout_s, retry=FAST) as client:
            return client.run(operation)

    async def in_thread(*args: Any) -> Any:
        return await asyncio.to_thread(run_sync, *args)

    return run_async if request.param == "async" else in_thread


READ = operations.retrieve(QUERY)
EVENTS = operations.record_events(1, [2])
RECORDED = http(200, {"user_id": 1, "recorded": 1})


async def test_a_refusal_and_then_success(run: Any) -> None:
    script = (refusal(429, "overloaded", retry_after="0"), refusal(503, "not_ready"))
    async with scripted(*script, OK) as (url, server):
        assert (await run(url, READ)).model == "nann"
        assert len(server.requests) == 3
    async with scripted(*script, RECORDED) as (url, server):
        assert await run(url, EVENTS) == 1
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [DROP, refusal(503, "unavailable"), refusal(503, "backend_error")])
async def test_events_that_may_have_been_recorded_are_not_sent_again(fault: bytes, run: Any) -> None:
    async with scripted(fault, RECORDED) as (url, server):
        with pytest.raises(nc.Unavailable):
            await run(url, EVENTS)
        assert len(server.requests) == 1
    async with scripted(fault, OK) as (url, server):
        assert (await run(url, READ)).model == "nann"
        assert len(server.requests) == 2


async def test_the_last_refusal_is_told_when_the_attempts_are_over(run: Any) -> None:
    async with scripted(*[refusal(503, "unavailable")] * 3) as (url, server):
        with pytest.raises(nc.Unavailable, match="no") as raised:
            await run(url, READ)
        assert (raised.value.code, raised.value.request_id) == ("unavailable", "r1")
        assert len(server.requests) == 3


@pytest.mark.parametrize("as_date", [False, True])
async def test_whoever_should_come_back_too_late_hears_so_at_once(as_date: bool, run: Any) -> None:
    in_an_hour = datetime.now(timezone.utc) + timedelta(hours=1)
    wait = format_datetime(in_an_hour, usegmt=True) if as_date else "3600"
    async with scripted(refusal(429, "overloaded", retry_after=wait)) as (url, server):
        with pytest.raises(nc.Overloaded) as raised:
            await run(url, READ)
        assert 3500 < (raised.value.retry_after_s or 0) <= 3600
        assert len(server.requests) == 1


async def test_a_server_that_hangs_costs_no_more_than_the_calls_time(run: Any) -> None:
    async with scripted(HANG, HANG) as (url, server):
        with pytest.raises(nc.DeadlineExceeded):
            await run(url, READ, 0.1)
        assert len(server.requests) == 1


async def test_a_connection_that_was_closed_meanwhile_is_made_again() -> None:
    async with scripted(OK, OK, OK) as (url, server), nc.AsyncClient(url, retry=FAST) as client:
        await client.retrieve(QUERY)
        server.hang_up()
        await client.retrieve(QUERY)
        await client.retrieve(QUERY)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (http(502, "<html>Bad Gateway</html>"), nc.Unavailable),
        (http(429, "slow down"), nc.Overloaded),
        (http(404, "<html>"), nc.NotFound),
        (http(401, ""), nc.Unauthenticated),
        (http(500, {"error": "boom"}), nc.ServerError),
        (http(418, {"error": {"code": "teapot", "message": "short and stout"}}), nc.InvalidQuery),
        (http(200, "<html>Welcome</html>"), nc.BadReply),
        (http(200, {"items": 3}), nc.BadReply),
        (http(200, "[]"), nc.BadReply),
        (http(307, "", location="/retrieve"), nc.BadReply),
    ],
)
async def test_what_is_not_the_service_is_told_by_its_status(
    answer: bytes, error: type[nc.NannError], run: Any
) -> None:
    async with scripted(*[answer] * 3) as (url, _server):
        with pytest.raises(error) as raised:
            await run(url, READ)
        assert type(raised.value) is error


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_a_port_where_nobody_listens(scheme: str, run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(nc.ConnectionFailed) as raised:
        await run(f"{scheme}://127.0.0.1:{port}", EVENTS)
    assert raised.value.never_sent


async def test_a_task_that_is_cancelled_ends() -> None:
    async with scripted(HANG) as (url, _server), nc.AsyncClient(url) as client:
        task = asyncio.create_task(client.retrieve(QUERY))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# gRPC


class ScriptedGrpc:
    """Answers with a message, or with a status, details and trailing metadata."""

    def __init__(self, script: Sequence[Any]) -> None:
        self._script = list(script)
        self.n_calls = 0

    async def answer(self, _request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.n_calls += 1
        step = self._script.pop(0)
        if isinstance(step, bytes):
            return step
        if step == "hang":
            await asyncio.Event().wait()
        status, metadata = step
        await context.abort(getattr(grpc.StatusCode, status), "no", tuple(metadata.items()))
        raise AssertionError


@asynccontextmanager
async def scripted_grpc(*script: Any) -> AsyncIterator[tuple[str, ScriptedGrpc]]:
    servicer = ScriptedGrpc(script)
    handler = grpc.unary_unary_rpc_method_handler(servicer.answer)
    server = grpc.aio.server()
    methods = dict.fromkeys(("Retrieve", "RecordEvents"), handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RETRIEVAL_SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", servicer
    finally:
        await server.stop(None)


FULL = ("RESOURCE_EXHAUSTED", {"nann-error-code": "overloaded", "grpc-retry-pushback-ms": "0"})
LOADING = ("UNAVAILABLE", {"nann-error-code": "not_ready"})
NO_STORE = ("UNAVAILABLE", {"nann-error-code": "unavailable", "x-request-id": "r1"})
GRPC_OK = method_types(RETRIEVAL_SERVICE, "Retrieve")[1](model="nann").SerializeToString()
GRPC_RECORDED = method_types(RETRIEVAL_SERVICE, "RecordEvents")[1](recorded=1).SerializeToString()


async def test_grpc_a_refusal_and_then_success(run: Any) -> None:
    async with scripted_grpc(FULL, LOADING, GRPC_OK) as (url, servicer):
        assert (await run(url, READ)).model == "nann"
        assert servicer.n_calls == 3
    async with scripted_grpc(FULL, LOADING, GRPC_RECORDED) as (url, servicer):
        assert await run(url, EVENTS) == 1


@pytest.mark.parametrize("fault", [NO_STORE, ("UNAVAILABLE", {})])
async def test_grpc_events_that_may_have_been_recorded_are_not_sent_again(fault: Any, run: Any) -> None:
    async with scripted_grpc(fault, GRPC_RECORDED) as (url, servicer):
        with pytest.raises(nc.Unavailable):
            await run(url, EVENTS)
        assert servicer.n_calls == 1
    async with scripted_grpc(fault, GRPC_OK) as (url, servicer):
        assert (await run(url, READ)).model == "nann"


async def test_grpc_a_server_that_hangs_costs_no_more_than_the_calls_time(run: Any) -> None:
    async with scripted_grpc("hang") as (url, _servicer):
        with pytest.raises(nc.DeadlineExceeded):
            await run(url, READ, 0.1)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("RESOURCE_EXHAUSTED", nc.PayloadTooLarge),
        ("UNIMPLEMENTED", nc.Unsupported),
        ("UNAUTHENTICATED", nc.Unauthenticated),
        ("PERMISSION_DENIED", nc.PermissionDenied),
        ("UNKNOWN", nc.ServerError),
        ("NOT_FOUND", nc.NotFound),
        ("INTERNAL", nc.ServerError),
    ],
)
async def test_grpc_a_status_without_a_code_is_told_by_itself(
    status: str, error: type[nc.NannError], run: Any
) -> None:
    async with scripted_grpc((status, {})) as (url, _servicer):
        with pytest.raises(error) as raised:
            await run(url, READ)
        assert (type(raised.value), raised.value.message) == (error, "no")


async def test_grpc_bytes_that_are_no_message(run: Any) -> None:
    async with scripted_grpc(b"\xff\xff") as (url, _servicer):
        with pytest.raises(nc.BadReply):
            await run(url, READ)


# Before anything is sent


@pytest.mark.parametrize("url", ["127.0.0.1:8501", "ftp://x", "http://", ""])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not http://"):
        nc.Client(url)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_call_must_have_time(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        nc.Client("http://127.0.0.1:1", timeout_s=timeout_s)


@pytest.mark.parametrize("subject", [{}, {"user_id": 1, "history": []}])
def test_a_query_is_for_exactly_one(subject: Any) -> None:
    with pytest.raises(nc.InvalidQuery, match="exactly one"):
        nc.Query(**subject)
