"""TLS and client certificates on both transports, and a certificate that changes under the server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, Certificate
from fake_engine import FakeEngine
from transports import Transports

from nann.service.pb import retrieval_pb2 as pb
from nann.service.pb import retrieval_pb2_grpc

QUERY = {"user_id": 1, "k": 3}
REQUEST = pb.RetrieveRequest(user_id=pb.Id(number=1), k=3)


@contextlib.asynccontextmanager
async def served(
    directory: Path, server: Certificate, client_ca: Path | None = None
) -> AsyncIterator[Transports]:
    files = {"tls_cert_file": server.cert, "tls_key_file": server.key, "tls_client_ca_file": client_ca}
    async with Transports(directory, FakeEngine(), **files).open() as world:
        yield world


async def over_rest(world: Transports, ca: Path, client: Certificate | None = None) -> int:
    context = ssl.create_default_context(cafile=ca)
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    async with httpx.AsyncClient(verify=context) as http:
        response = await http.post(f"https://127.0.0.1:{world.address[1]}/retrieve", json=QUERY)
    return response.status_code


def channel_credentials(ca: Path, client: Certificate | None) -> grpc.ChannelCredentials:
    key, cert = (None, None) if client is None else (client.key.read_bytes(), client.cert.read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)


async def over_grpc(world: Transports, ca: Path, client: Certificate | None = None) -> int:
    credentials = channel_credentials(ca, client)
    async with grpc.aio.secure_channel(f"127.0.0.1:{world.grpc_port}", credentials) as channel:
        stub: Any = retrieval_pb2_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        return len((await stub.Retrieve(REQUEST, timeout=10)).items)


def certificate_now(port: int) -> bytes:
    """What the listener shows to whoever connects."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as connection:
        return connection.getpeercert(binary_form=True) or b""


async def test_both_transports_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with served(tmp_path, authority.issue("server")) as world:
        assert await over_rest(world, authority.ca) == 200
        assert await over_grpc(world, authority.ca) == 3
        with pytest.raises(httpx.TransportError):
            await world.http.get("/livez")
        with pytest.raises(grpc.aio.AioRpcError):
            await world.native.Retrieve(REQUEST, timeout=5)


async def test_old_versions_of_tls_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with served(tmp_path, authority.issue("server")) as world:
        context = ssl.create_default_context(cafile=authority.ca)
        with pytest.warns(DeprecationWarning):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        async with httpx.AsyncClient(verify=context) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"https://127.0.0.1:{world.address[1]}/livez")


async def test_callers_show_certificates(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    server, client, stranger = ours.issue("server"), ours.issue("client"), theirs.issue("stranger")
    async with served(tmp_path, server, client_ca=ours.ca) as world:
        assert await over_rest(world, ours.ca, client) == 200
        assert await over_grpc(world, ours.ca, client) == 3
        for wrong in (None, stranger):
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await over_rest(world, ours.ca, wrong)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await over_grpc(world, ours.ca, wrong)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("with_client_ca", [False, True])
async def test_a_new_certificate_is_shown_without_a_restart(tmp_path: Path, with_client_ca: bool) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("client")
    async with served(tmp_path, server, authority.ca if with_client_ca else None) as world:
        assert await over_rest(world, authority.ca, client) == 200
        assert await over_grpc(world, authority.ca, client) == 3
        authority.issue("server")
        renewed = ssl.PEM_cert_to_DER_cert(server.cert.read_text(encoding="utf-8"))
        if not with_client_ca:
            for port in (world.address[1], world.grpc_port):
                assert await asyncio.to_thread(certificate_now, port) == renewed
        assert await over_rest(world, authority.ca, client) == 200
        assert await over_grpc(world, authority.ca, client) == 3
        if with_client_ca:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await over_rest(world, authority.ca)
            with pytest.raises(grpc.aio.AioRpcError):
                await over_grpc(world, authority.ca)
