"""`nann benchmark`: its flags, its HTTP client, and the targets it composes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from engine_world import World, make_world
from typer.testing import CliRunner

from nann.cli.benchmark_engine import find_version, in_process
from nann.cli.benchmark_http import HttpClient
from nann.cli.benchmark_overhead import _batches
from nann.cli.benchmark_targets import Ask, _error_code, _retrieve_message, rest_target
from nann.cli.main import app
from nann.engine.errors import ArtifactError
from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.users import User, sample_users
from nann.service.pb import retrieval_pb2 as pb
from nann.service.settings import Settings, load_settings
from nann.service.wire.native_proto import request_of_proto
from nann.service.wire.rest_json import requests_of_body


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("repository") / "nann" / "3", num_items=300, degree=8, seed=2)


@pytest.fixture
def settings(world: World) -> Settings:
    return load_settings({}, repository=world.directory.parent.parent)


# Flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--repository"),
        (["--url", "ftp://x"], "http(s)://HOST:PORT"),
        (["--url", "http://x"], "--queries"),
        (["--url", "http://x", "--predict"], "grpc://HOST:PORT"),
        (["--url", "grpc://x", "--predict"], "--level-topn"),
        (["--url", "http://x", "--overhead"], "--overhead"),
        (["--url", "http://x", "--lanes", "2"], "--lanes"),
        (["--url", "http://x", "--rate", "-1"], "positive"),
        (["--url", "http://x", "--level-topn", "1,b"], "six numbers"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_to_do(arguments: list[str], words: str) -> None:
    result = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["benchmark", *arguments]
    )
    assert result.exit_code == 2
    assert words in result.output


# What is asked for


@pytest.mark.parametrize(
    ("ask", "user"),
    [
        (Ask(), User(user_id=7, history=[1, 2])),
        (Ask(by_user_id=True), User(user_id=7, history=[1, 2])),
        (Ask(with_attributes=True), User(user_id="seven")),
        (
            Ask(k=5, model="m", profile="fast", params={"ef": 9, "beam_width": 3}, exclude_seen=False),
            User(history=["a", "b"]),
        ),
        (Ask(params={"level_topn": (1, 2, 3, 4, 5, 6)}), User(history=[3])),
    ],
)
def test_rest_and_grpc_ask_for_the_same(ask: Ask, user: User) -> None:
    body = ask.body(user)
    over_rest, batched = requests_of_body(orjson.loads(orjson.dumps(body)))
    over_grpc = request_of_proto(_retrieve_message(pb, body))
    assert [replace(over_grpc, exclude_ids=())] == [replace(one, exclude_ids=()) for one in over_rest]
    assert not batched


def test_a_user_without_an_id_cannot_be_asked_for_by_id() -> None:
    with pytest.raises(ValueError, match="no user_id"):
        Ask(by_user_id=True).body(User(history=[1]))


# The engine in process


async def test_in_process_answers_as_the_engine_does(world: World, settings: Settings) -> None:
    engine = world.engine(lanes=2, max_batch=4)
    engine.warm_up()
    users = sample_users(world.directory, limit=6, seed=0)
    ask = Ask(k=10, params={"ef": 40, "beam_width": 4})
    params = SearchParams(ef=40, beam_width=4)
    async with in_process(engine, settings, ask, users, timeout_s=30) as target:
        outcomes = await asyncio.gather(*(target.send(i) for i in range(12)))
    for i, outcome in enumerate(outcomes):
        history = list(users[i % 6].history or ())
        query = engine.check(Query(k=10, params=params, history=history, seen=history))
        (hits,) = engine.search([query], 0)
        assert (outcome.code, outcome.n_scored) == ("ok", hits.n_scored)
        assert outcome.service_s is not None
        assert outcome.service_s > 0
    assert max(outcome.batch_size or 0 for outcome in outcomes) > 1


async def test_in_process_reports_refusals_by_their_code(world: World) -> None:
    settings = load_settings(
        {}, repository=world.directory.parent.parent, queue_limit=1, max_queries_per_call=1
    )
    engine = world.engine(lanes=1, max_batch=1)
    engine.warm_up()
    users = sample_users(world.directory, limit=1, seed=0)
    async with in_process(engine, settings, Ask(k=3), users, timeout_s=30) as target:
        outcomes = await asyncio.gather(*(target.send(i) for i in range(8)))
    assert {outcome.code for outcome in outcomes} == {"ok", "overloaded"}


def test_a_path_means_a_version_a_run_or_a_repository(world: World, tmp_path: Path) -> None:
    version = world.directory
    assert find_version(version, None) == version
    assert find_version(version.parent.parent, None) == version
    run = tmp_path / "run"
    run.mkdir()
    (run / "index").symlink_to(version)
    assert find_version(run, None) == run / "index"
    with pytest.raises(ArtifactError):
        find_version(tmp_path / "run" / "nothing", None)
    with pytest.raises(ArtifactError):
        find_version(version.parent.parent, "other")
    repository = tmp_path / "repository"
    for name in ("a", "b"):
        (repository / name / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="a, b"):
        find_version(repository, None)
    assert find_version(repository, "b") == repository / "b" / "1"


def test_batches_share_one_compat(world: World) -> None:
    engine = world.engine()
    prepared = [
        engine.check(Query(k=3, params=SearchParams(ef=20 + i % 2), history=[int(world.item_ids[i])]))
        for i in range(10)
    ]
    batches = _batches(prepared, 3, 2)
    assert [len({query.compat for query in batch}) for batch in batches] == [1, 1]
    assert [len(batch) for batch in batches] == [3, 3]
    with pytest.raises(ValueError, match="too few users"):
        _batches(prepared, 3, 3)


# The HTTP client, against a server that is a function from request to pieces of an answer

OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"


class Wire(asyncio.Transport):
    def __init__(self, protocol: Any, serve: Callable[[bytes], list[bytes] | None]) -> None:
        super().__init__()
        self._protocol, self._serve = protocol, serve
        self._closing = False

    def write(self, data: Any) -> None:
        loop = asyncio.get_running_loop()
        pieces = self._serve(bytes(data))
        if pieces is None:
            loop.call_soon(self._lose)
            return
        for piece in pieces:
            loop.call_soon(self._protocol.data_received, piece)

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self._closing = True
        asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def _lose(self) -> None:
        self._closing = True
        self._protocol.connection_lost(None)


@pytest.fixture
async def wires(monkeypatch: pytest.MonkeyPatch) -> list[Wire]:
    """Every connection that was opened to `http://x`."""
    opened: list[Wire] = []

    async def create_connection(factory: Callable[[], Any], host: str, port: int, **_: Any) -> Any:
        assert (host, port) == ("x", 80)
        protocol = factory()
        wire = Wire(protocol, answers)
        protocol.connection_made(wire)
        opened.append(wire)
        return wire, protocol

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
    return opened


def answers(request: bytes) -> list[bytes] | None:
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /retrieve HTTP/1.1\r\nHost: x\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return ANSWERS.get(body, [])


ANSWERS: dict[bytes, list[bytes] | None] = {
    b"whole": [OK_HEAD + b"whole"],
    b"parts": [OK_HEAD[:10], OK_HEAD[10:] + b"pa", b"rts"],
    b"chunk": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nchunk\r\n", b"0\r\n\r\n"],
    b"close": [b"HTTP/1.1 429 Busy\r\nConnection: close\r\nContent-Length: 5\r\n\r\nclose"],
    b"lost!": None,
    b"what?": [b"SSH-2.0-OpenSSH\r\n"],
}


async def test_answers_come_over_one_kept_connection(wires: list[Wire]) -> None:
    client = HttpClient("http://x", timeout_s=5)
    for body in (b"whole", b"parts", b"chunk", b"whole"):
        assert await client.post("/retrieve", body) == (200, body)
    assert len(wires) == 1
    await client.close()
    assert wires[0].is_closing()


async def test_simultaneous_requests_have_connections_of_their_own(wires: list[Wire]) -> None:
    client = HttpClient("http://x", timeout_s=5)
    await asyncio.gather(*(client.post("/retrieve", b"whole") for _ in range(3)))
    assert len(wires) == 3
    await client.post("/retrieve", b"whole")
    assert len(wires) == 3


@pytest.mark.parametrize(
    ("body", "error"), [(b"lost!", ConnectionResetError), (b"what?", ValueError), (b"never", TimeoutError)]
)
async def test_a_connection_that_failed_is_not_used_again(
    wires: list[Wire], body: bytes, error: type[Exception]
) -> None:
    client = HttpClient("http://x", timeout_s=0.01)
    with pytest.raises(error):
        await client.post("/retrieve", body)
    assert await client.post("/retrieve", b"whole") == (200, b"whole")
    assert len(wires) == 2


async def test_a_server_may_close_after_an_answer(wires: list[Wire]) -> None:
    client = HttpClient("http://x", timeout_s=5)
    assert await client.post("/retrieve", b"close") == (429, b"close")
    assert await client.post("/retrieve", b"whole") == (200, b"whole")
    assert len(wires) == 2


async def test_a_connection_that_was_idle_for_long_is_not_used_again(
    wires: list[Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be about to close it."""
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("nann.cli.benchmark_http.time", clock)
    client = HttpClient("http://x", timeout_s=5)
    for clock.now_s, connections in ((0.0, 1), (59.0, 1), (118.0, 1), (178.0, 2)):
        await client.post("/retrieve", b"whole")
        assert len(wires) == connections
    assert wires[0].is_closing()


def test_only_http_addresses() -> None:
    for url in ("grpc://x", "http://", "x:80"):
        with pytest.raises(ValueError, match="http://HOST:PORT"):
            HttpClient(url, timeout_s=1)


async def test_a_rest_target_tells_what_the_reply_does(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {
        0: (200, orjson.dumps({"n_scored": 9, "timings_ms": {"queue": 1, "search": 2, "total": 4}})),
        1: (200, orjson.dumps({"n_scored": 0, "timings_ms": {"total": 4}})),
        2: (429, orjson.dumps({"error": {"code": "overloaded", "message": "full"}})),
        3: ConnectionRefusedError("nobody there"),
        4: TimeoutError("late"),
    }

    async def post(_client: HttpClient, path: str, body: bytes) -> tuple[int, bytes]:
        assert path == "/retrieve"
        reply = replies[orjson.loads(body)["history"][0]]
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(HttpClient, "post", post)
    users = [User(history=[i]) for i in replies]
    async with rest_target("http://x", Ask(), users, timeout_s=1) as target:
        outcomes = [await target.send(i) for i in range(5)]
    assert [outcome.code for outcome in outcomes] == [
        "ok",
        "ok",
        "overloaded",
        "connection_failed",
        "client_timeout",
    ]
    assert (outcomes[0].service_s, outcomes[0].queue_s, outcomes[0].n_scored) == (0.002, 0.001, 9)
    assert (outcomes[1].service_s, outcomes[1].queue_s) == (None, None)


def test_an_error_page_that_is_not_ours_is_named_by_its_status() -> None:
    assert _error_code(502, b"<html>") == "http_502"
    assert _error_code(500, b'{"error": "text"}') == "http_500"
