"""`nann query` and the loads of `nann benchmark` against a server that asks for keys and certificates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import Authority
from fake_engine import PATIENCE_S, FakeEngine
from transports import Transports

from nann.cli.benchmark_targets import Ask, grpc_target, predict_target, rest_target
from nann.cli.credentials import API_KEY_VARIABLE, Credentials
from nann.cli.main import run
from nann.offline.benchmark.load import OK
from nann.offline.benchmark.users import User

KEY = "a-key-to-read-with-012345"
USERS = [User(history=(10, 11))]


class World:
    """The server, and what a command needs to get in."""

    def __init__(self, directory: Path) -> None:
        authority = Authority(directory)
        server, client = authority.issue("server"), authority.issue("client")
        keys = directory / "keys"
        keys.write_text(f"reader read {KEY}\n", encoding="utf-8")
        self.key_file = directory / "key"
        self.key_file.write_text(f"{KEY}\n", encoding="utf-8")
        self.credentials = Credentials(KEY, authority.ca, (client.cert, client.key))
        self.flags = ["--ca-file", authority.ca, "--client-cert-file", client.cert]
        self.flags += ["--client-key-file", client.key]
        self.transports = Transports(
            directory,
            FakeEngine(),
            api_keys_file=keys,
            tls_cert_file=server.cert,
            tls_key_file=server.key,
            tls_client_ca_file=authority.ca,
        )

    @property
    def urls(self) -> list[str]:
        world = self.transports
        return [f"https://127.0.0.1:{world.address[1]}", f"grpcs://127.0.0.1:{world.grpc_port}"]

    async def query(self, url: str, *more: object) -> int:
        arguments = ["query", "--json", "--url", url, "--user", "1", "--k", "3"]
        return await asyncio.to_thread(run, [*arguments, *map(str, more)])


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    made = World(tmp_path)
    async with made.transports.open():
        yield made


async def test_a_query_with_all_of_them(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in world.urls:
        capsys.readouterr()
        assert await world.query(url, *world.flags, "--api-key-file", world.key_file) == 0
        assert len(json.loads(capsys.readouterr().out)["items"]) == 3
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert await world.query(world.urls[0], *world.flags) == 0


async def test_a_query_without_one_of_them(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for url in world.urls:
        assert await world.query(url, *world.flags) == 1
        assert "unauthenticated" in capsys.readouterr().err
        assert await world.query(url, *world.flags[:2], "--api-key-file", world.key_file) == 1
        assert await world.query(url, "--api-key-file", world.key_file) == 1


async def test_the_loads_of_a_benchmark(world: World) -> None:
    rest_url, grpc_url = world.urls
    options = {"timeout_s": PATIENCE_S, "credentials": world.credentials}
    topn = Ask(params={"level_topn": (4, 4, 4, 4, 4, 4)})
    for opened in (
        rest_target(rest_url, Ask(k=3), USERS, **options),
        grpc_target(grpc_url, Ask(k=3), USERS, **options),
        predict_target(grpc_url, topn, comm_seq_width=3200, requests=1, seed=0, **options),
    ):
        async with opened as target:
            assert (await target.send(0)).code == OK
    keyless = Credentials(None, world.credentials.ca_file, world.credentials.client_cert)
    for opened in (
        rest_target(rest_url, Ask(k=3), USERS, timeout_s=PATIENCE_S, credentials=keyless),
        grpc_target(grpc_url, Ask(k=3), USERS, timeout_s=PATIENCE_S, credentials=keyless),
    ):
        async with opened as target:
            assert (await target.send(0)).code == "unauthenticated"
