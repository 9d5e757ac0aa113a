"""The client package over TLS, with and without a certificate of its own: every transport, both ways."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nann_client as nc
import pytest
from certificates import Authority, Certificate
from fake_engine import PATIENCE_S, FakeEngine
from transports import Transports

KINDS = [(scheme, is_async) for scheme in ("https", "grpcs") for is_async in (False, True)]
KIND_NAMES = [f"{scheme}-{'async' if is_async else 'sync'}" for scheme, is_async in KINDS]
QUERY = nc.Query(user_id=1, k=3)


class World:
    """A server that asks for certificates of `ours`."""

    def __init__(self, directory: Path) -> None:
        self.ours, theirs = Authority(directory, "ours"), Authority(directory, "theirs")
        self.client, self.stranger = self.ours.issue("client"), theirs.issue("stranger")
        server = self.ours.issue("server")
        self.strangers_ca = theirs.ca
        self.transports = Transports(
            directory,
            FakeEngine(),
            tls_cert_file=server.cert,
            tls_key_file=server.key,
            tls_client_ca_file=self.ours.ca,
        )

    async def retrieve(
        self,
        scheme: str,
        is_async: bool,
        ca: Path | None,
        cert: Certificate | None,
        timeout_s: float = PATIENCE_S,
    ) -> nc.Reply:
        port = self.transports.address[1] if scheme == "https" else self.transports.grpc_port
        options: dict[str, Any] = {
            "ca_file": ca,
            "client_cert": None if cert is None else (cert.cert, str(cert.key)),
            "timeout_s": timeout_s,
            "retry": nc.RetryPolicy(max_attempts=1),
        }
        url = f"{scheme}://127.0.0.1:{port}"
        if is_async:
            async with nc.AsyncClient(url, **options) as client:
                return await client.retrieve(QUERY)
        return await asyncio.to_thread(self._blocking, url, options)

    @staticmethod
    def _blocking(url: str, options: dict[str, Any]) -> nc.Reply:
        with nc.Client(url, **options) as client:
            return client.retrieve(QUERY)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    async with made.transports.open():
        yield made


@pytest.mark.parametrize(("scheme", "is_async"), KINDS, ids=KIND_NAMES)
async def test_a_certificate_lets_a_client_in(world: World, scheme: str, is_async: bool) -> None:
    reply = await world.retrieve(scheme, is_async, world.ours.ca, world.client)
    assert len(reply.items) == 3


@pytest.mark.parametrize("which", ["none", "stranger"])
@pytest.mark.parametrize(("scheme", "is_async"), KINDS, ids=KIND_NAMES)
async def test_without_one_of_the_servers_authority_there_is_no_connection(
    world: World, scheme: str, is_async: bool, which: str
) -> None:
    cert = None if which == "none" else world.stranger
    with pytest.raises(nc.ConnectionFailed):
        await world.retrieve(scheme, is_async, world.ours.ca, cert, timeout_s=2.0)


@pytest.mark.parametrize("which", ["the system's", "another"])
@pytest.mark.parametrize(("scheme", "is_async"), KINDS, ids=KIND_NAMES)
async def test_a_server_of_another_authority_is_not_trusted(
    world: World, scheme: str, is_async: bool, which: str
) -> None:
    ca = None if which == "the system's" else world.strangers_ca
    with pytest.raises(nc.ConnectionFailed):
        await world.retrieve(scheme, is_async, ca, world.client, timeout_s=2.0)


@pytest.mark.parametrize(("scheme", "is_async"), KINDS, ids=KIND_NAMES)
async def test_a_file_that_is_not_there_is_told_before_a_call(
    world: World, scheme: str, is_async: bool, tmp_path: Path
) -> None:
    missing = Certificate(tmp_path / "none.pem", world.client.key)
    with pytest.raises(FileNotFoundError):
        await world.retrieve(scheme, is_async, world.ours.ca, missing)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_certificates_without_tls_are_a_mistake(scheme: str, tmp_path: Path) -> None:
    for options in ({"ca_file": tmp_path / "ca.pem"}, {"client_cert": (tmp_path / "c", tmp_path / "k")}):
        with pytest.raises(ValueError, match=f"{scheme}s://"):
            nc.Client(f"{scheme}://127.0.0.1:1", **options)


def test_the_key_of_another_certificate_is_told(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(ssl.SSLError):
        nc.Client("https://127.0.0.1:1", client_cert=(one.cert, other.key))
