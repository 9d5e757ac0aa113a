"""The whole process but for the model: real ports, real signals, a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import PATIENCE_S, FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nann.engine.errors import ArtifactError, BackendError
from nann.service.app import Application, Exit, _listen
from nann.service.health import HealthState
from nann.service.pb import retrieval_pb2 as pb
from nann.service.pb import retrieval_pb2_grpc
from nann.service.settings import Settings


class Running:
    def __init__(self, directory: Path, load_engine: Any, **settings: Any) -> None:
        (directory / "nann" / "1").mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {"rest_port": 0, "grpc_port": 0, "user_store": "memory"}
        fields |= {"drain_grace_s": PATIENCE_S, "drain_linger_s": 0}
        self.app = Application(
            Settings(repository=directory, **{**fields, **settings}), load_engine=load_engine
        )
        self.client = httpx.AsyncClient()
        self.task: asyncio.Task[Exit] = asyncio.create_task(self.app.run())

    async def ready(self) -> None:
        waiting = asyncio.create_task(self.app.ready.wait())
        await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        assert waiting.done(), self.task
        self.client.base_url = httpx.URL(f"http://127.0.0.1:{self.app.rest_port}")

    async def exit(self) -> Exit:
        return await asyncio.wait_for(self.task, 2 * PATIENCE_S)

    async def grpc_status(self) -> int:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.app.grpc_port}") as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            status: int = reply.status
            return status


@contextlib.asynccontextmanager
async def running(directory: Path, load_engine: Any, **settings: Any) -> AsyncIterator[Running]:
    server = Running(directory, load_engine, **settings)
    try:
        yield server
    finally:
        await server.client.aclose()
        if not server.task.done():
            server.app.stop()
            server.app.stop()
            await server.exit()


async def until_state(app: Application, state: HealthState) -> None:
    reached = asyncio.Event()
    app.health.subscribe(lambda _ready: reached.set() if app.health.state is state else None)
    await asyncio.wait_for(reached.wait(), PATIENCE_S)


async def engine_has_it(engine: FakeEngine) -> None:
    """Return once a lane holds a search at the closed gate."""
    assert await asyncio.to_thread(engine.searching.wait, PATIENCE_S)


async def test_from_start_to_sigterm(tmp_path: Path) -> None:
    engine, ready_file = FakeEngine(), tmp_path / "ready.json"
    loading, go = threading.Event(), threading.Event()

    def load(_path: Path) -> Any:
        loading.set()
        assert go.wait(PATIENCE_S)
        return engine

    async with running(tmp_path, load, ready_file=ready_file) as server:
        assert await asyncio.to_thread(loading.wait, PATIENCE_S)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.app.rest_port}") as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.post("/retrieve", json={"history": [1]})).status_code == 503
        assert await server.grpc_status() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not ready_file.exists()
        go.set()
        await server.ready()
        ports = json.loads(ready_file.read_text())
        assert ports == {
            "pid": os.getpid(),
            "rest_port": server.app.rest_port,
            "grpc_port": server.app.grpc_port,
        }
        assert (await server.client.get("/readyz")).status_code == 200
        assert await server.grpc_status() == health_pb2.HealthCheckResponse.SERVING
        reply = await server.client.post("/retrieve", json={"user_id": 1, "k": 3})
        assert [item["item_id"] for item in reply.json()["items"]] == [0, 1, 2]
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.exit() == Exit(0)
        assert engine.closed
        assert server.app.health.state is HealthState.DRAINING


async def test_a_device_that_comes_back_is_found_without_traffic(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine) as server:
        await server.ready()
        engine.search_error = BackendError("lost")
        impaired = asyncio.create_task(until_state(server.app, HealthState.IMPAIRED))
        assert (await server.client.post("/retrieve", json={"history": [1]})).status_code == 503
        await impaired
        engine.search_error = None
        await until_state(server.app, HealthState.READY)
        assert (await server.client.get("/readyz")).status_code == 200


async def test_a_process_whose_devices_are_all_lost_ends_by_itself(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine, exit_after_impaired_s=1e-9) as server:
        await server.ready()
        engine.search_error = BackendError("lost")
        assert (await server.client.post("/retrieve", json={"history": [1]})).status_code == 503
        assert await server.exit() == Exit(1)


async def test_sigterm_finishes_what_was_accepted_and_accepts_nothing_new(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine) as server:
        await server.ready()
        engine.gate.clear()
        accepted = asyncio.create_task(server.client.post("/retrieve", json={"history": [1], "k": 2}))
        await engine_has_it(engine)
        server.app.stop()
        await until_state(server.app, HealthState.DRAINING)
        with pytest.raises(httpx.ConnectError):
            while True:  # until the listener is closed, a few turns of the loop later
                async with httpx.AsyncClient() as late:
                    # A connection that nobody has taken up yet when the listener closes is reset.
                    with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):
                        await late.get(f"http://127.0.0.1:{server.app.rest_port}/readyz")
        assert not server.task.done()
        engine.gate.set()
        reply = await accepted
        assert (reply.status_code, len(reply.json()["items"])) == (200, 2)
        assert await server.exit() == Exit(0)


async def test_after_sigterm_callers_are_told_for_a_while_and_none_is_cancelled(tmp_path: Path) -> None:
    """Calls on a connection that is already open, one after another until the port is closed."""
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine, drain_linger_s=0.3) as server:
        await server.ready()
        engine.gate.clear()
        query = pb.RetrieveRequest(history=pb.IdList(ids=[pb.Id(number=1)]), k=2)
        codes: Counter[grpc.StatusCode] = Counter()
        refusals = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.app.grpc_port}") as channel:
            native = retrieval_pb2_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
            accepted = asyncio.ensure_future(native.Retrieve(query))
            await engine_has_it(engine)
            server.app.stop()
            await until_state(server.app, HealthState.DRAINING)
            while not server.task.done():
                try:
                    await native.Retrieve(query)
                except grpc.aio.AioRpcError as error:
                    codes[error.code()] += 1
                    refusals += dict(error.trailing_metadata() or ()).get("nann-error-code") == "not_ready"
                if refusals == 3:
                    engine.gate.set()
            assert len((await accepted).items) == 2
        assert refusals >= 3
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        assert await server.exit() == Exit(0)


async def test_what_never_finishes_is_given_up_after_the_grace(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine, drain_grace_s=0.05) as server:
        await server.ready()
        engine.gate.clear()
        stuck = asyncio.create_task(server.client.post("/retrieve", json={"history": [1]}))
        await engine_has_it(engine)
        server.app.stop()
        assert await server.exit() == Exit(1, threads_left=True)
        engine.gate.set()
        await asyncio.gather(stuck, return_exceptions=True)


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, lambda _path: engine, drain_grace_s=3600) as server:
        await server.ready()
        engine.gate.clear()
        stuck = asyncio.create_task(server.client.post("/retrieve", json={"history": [1]}))
        await engine_has_it(engine)
        server.app.stop()
        server.app.stop()
        assert await server.exit() == Exit(1, threads_left=True)
        engine.gate.set()
        await asyncio.gather(stuck, return_exceptions=True)


async def test_a_signal_while_loading_ends_the_process_without_waiting_for_the_load(tmp_path: Path) -> None:
    loading, go = threading.Event(), threading.Event()

    def load(_path: Path) -> Any:
        loading.set()
        assert go.wait(PATIENCE_S)
        return FakeEngine()

    async with running(tmp_path, load) as server:
        assert await asyncio.to_thread(loading.wait, PATIENCE_S)
        server.app.stop()
        assert await server.exit() == Exit(0, threads_left=True)
        go.set()


@pytest.mark.parametrize(
    "error",
    [
        ArtifactError("arrays/item_embs.npy", expected="128 bytes", found="64 bytes"),
        ZeroDivisionError("a bug"),
    ],
)
async def test_a_version_that_cannot_be_served_ends_the_process_with_1(
    tmp_path: Path, error: Exception
) -> None:
    def load(_path: Path) -> Any:
        raise error

    async with running(tmp_path, load) as server:
        assert await server.exit() == Exit(1)


def test_a_reply_waits_for_no_acknowledgement() -> None:
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("which", ["rest_port", "grpc_port"])
async def test_a_port_in_use_ends_the_process_with_1(tmp_path: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with running(tmp_path, lambda _path: FakeEngine(), **{which: port}) as server:
            assert await server.exit() == Exit(1)


PROGRAM = """
import sys
from nann.service.app import serve
from nann.service.settings import load_settings
sys.exit(serve(load_settings(repository=sys.argv[1], rest_port=0, grpc_port=0, user_store="memory")))
"""


def test_a_damaged_version_is_one_line_that_names_file_expected_and_found(tmp_path: Path) -> None:
    (tmp_path / "nann" / "1").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    (failure,) = [line for line in lines if line["level"] == "error"]
    assert failure["file"].endswith("nann/1/manifest.json")
    assert {"expected", "found"} <= set(failure)
    assert sum(line["event"] == "settings" for line in lines) == 1
    assert done.stdout == ""
