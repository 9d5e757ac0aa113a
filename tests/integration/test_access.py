"""API keys over both transports: everything but the probes is refused without one, whatever it is."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import structlog
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from transports import Transports

from nann.service import access as access_module
from nann.service.access import Access, ApiKey, Role
from nann.service.grpc_api import access as grpc_access
from nann.service.health import Health
from nann.service.http_api.access import Guard, role_of
from nann.service.http_api.app import create_app
from nann.service.logs import configure_logging
from nann.service.metrics import Metrics
from nann.service.pb import retrieval_pb2 as pb
from nann.service.settings import Settings
from nann.service.wire import tf_messages

KEYS = {role: f"the-key-of-role-{role.name.lower()}-0123" for role in Role}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
QUERY = {"user_id": 1, "k": 3}


def keys_file(directory: Path) -> Path:
    path = directory / "api-keys"
    path.write_text("".join(f"{r.name} {r.name.lower()} {KEYS[r]}\n" for r in Role), encoding="utf-8")
    return path


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """What `configure_logging` changes is as before, afterwards."""
    root = logging.getLogger()
    handlers, level, uvicorn = root.handlers, root.level, logging.getLogger("uvicorn").level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(uvicorn)
    structlog.reset_defaults()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    async with Transports(tmp_path, FakeEngine(), api_keys_file=keys_file(tmp_path)).open() as opened:
        yield opened


def bearer(role: Role) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[role]}"}


async def grpc_code(call: Any) -> tuple[str, str, dict[str, Any]]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or "", dict(error.trailing_metadata() or ())
    return "OK", "", {}


def operations(world: Transports) -> list[tuple[str, str]]:
    """Every method and path of the application's own description."""
    app = create_app(cast("Any", None), world.settings, Health(), Metrics())
    return [(method.upper(), path) for path, some in app.openapi()["paths"].items() for method in some]


async def test_every_path_needs_a_key_but_the_probes(world: Transports) -> None:
    paths = operations(world)
    assert len(paths) > 15
    more = [("GET", path) for path in ("/docs", "/openapi.json", "/docs-assets/favicon.png", "/nothing", "/")]
    more += [("GET", "//metrics"), ("GET", "/livez/"), ("GET", "/livez/../metrics"), ("DELETE", "/metrics")]
    for method, path in [*paths, *more]:
        for headers in ({}, {"authorization": "Bearer nobody"}, {"x-api-key": "é".encode()}):  # type: ignore[var-annotated]
            response = await world.http.request(method, path, headers=headers)
            if path in ("/livez", "/readyz"):
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            if path.startswith("/v1/"):
                assert "API key" in error
            else:
                assert error["code"] == "unauthenticated"
                assert error["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/metrics", Role.METRICS),
        ("GET", "/healthz", Role.METRICS),
        ("POST", "/retrieve", Role.READ),
        ("GET", "/users/1", Role.READ),
        ("POST", "/users/1/events", Role.WRITE),
        ("DELETE", "/users/2", Role.WRITE),
        ("GET", "/v1/models/nann", Role.READ),
        ("GET", "/docs", Role.READ),
        ("POST", "/models/rescan", Role.ADMIN),
    ],
)
async def test_a_role_allows_what_lower_ones_do_and_no_more(
    world: Transports, method: str, path: str, needed: Role
) -> None:
    body = {"item_ids": [1]} if path.endswith("events") else QUERY
    for role in Role:
        for headers in (bearer(role), {"x-api-key": KEYS[role]}):
            response = await world.http.request(
                method, path, headers=headers, json=body if method == "POST" else None
            )
            if role < needed:
                assert response.status_code == 403
                assert needed.name.lower() in response.text
            else:
                assert response.status_code in (200, 404), response.text  # a deleted user stays deleted


async def test_every_method_needs_a_key_but_health(world: Transports) -> None:
    services = {
        "tensorflow.serving.PredictionService": tf_messages,
        "tensorflow.serving.ModelService": tf_messages,
    }
    paths = {f"/{name}/{method}" for name in services for method in tf_messages.service_methods(name)}
    native = pb.DESCRIPTOR.services_by_name["RetrievalService"]
    paths |= {f"/{native.full_name}/{method.name}" for method in native.methods}
    assert paths == set(grpc_access.ROLES)
    for path in (*paths, REFLECTION, "/nothing/Nothing"):
        for metadata in ((), (("authorization", "Bearer nobody"),), (("x-api-key", "nobody"),)):
            code, details, trailer = await grpc_code(
                world.channel.unary_unary(path)(b"\xff", metadata=(*metadata, ("x-request-id", "r1")))  # type: ignore[misc]
            )
            assert (code, "API key" in details) == ("UNAUTHENTICATED", True), path
            assert (trailer["nann-error-code"], trailer["x-request-id"]) == ("unauthenticated", "r1")
    assert (await grpc_code(world.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")))[0] == "OK"


@pytest.mark.parametrize("path", sorted(grpc_access.ROLES))
async def test_a_role_allows_its_methods(world: Transports, path: str) -> None:
    needed = grpc_access.ROLES[path]
    for role in Role:
        for metadata in ((("authorization", f"Bearer {KEYS[role]}"),), (("x-api-key", KEYS[role]),)):
            code, _, _ = await grpc_code(world.channel.unary_unary(path)(b"\xff", metadata=metadata))
            # What is let through is then refused for its bytes.
            assert code == ("PERMISSION_DENIED" if role < needed else "INVALID_ARGUMENT")


async def test_a_refused_stream_ends_at_once(world: Transports) -> None:
    call = world.channel.stream_stream(REFLECTION)()
    assert (await grpc_code(call.read()))[0] == "UNAUTHENTICATED"
    key = (("authorization", f"Bearer {KEYS[Role.READ]}"),)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = await world.channel.unary_unary(REFLECTION)(request.SerializeToString(), metadata=key)
    assert b"nann.retrieval.v1.RetrievalService" in reply


async def test_what_may_be_opened(tmp_path: Path) -> None:
    settings = {"api_keys_file": keys_file(tmp_path), "open_metrics": True, "open_docs": True}
    async with Transports(tmp_path, FakeEngine(), **settings).open() as world:  # type: ignore[arg-type]
        for path in ("/metrics", "/healthz", "/docs", "/openapi.json", "/docs-assets/favicon.png"):
            assert (await world.http.get(path)).status_code == 200
        assert (await world.http.post("/retrieve", json=QUERY)).status_code == 401
        reply = await grpc_code(world.channel.unary_unary(REFLECTION)(b"\x3a\x00"))
        assert reply[0] == "OK"


@pytest.mark.usefixtures("_own_logging")
async def test_refusals_are_counted_and_no_key_is_logged(world: Transports) -> None:
    stream = io.StringIO()
    configure_logging(level="debug", log_format="json", stream=stream)
    wrong = "a-wrong-key-that-somebody-sent"
    await world.http.post("/retrieve", json=QUERY, headers={"authorization": f"Bearer {wrong}"})
    await world.http.post("/retrieve", json=QUERY, headers=bearer(Role.METRICS))
    await world.http.post("/retrieve", json=QUERY, headers=bearer(Role.READ))
    await grpc_code(world.channel.unary_unary("/x/Y")(b"", metadata=(("x-api-key", wrong),)))
    text = world.metrics.render()[0].decode()
    for api, code, count in (("rest", "unauthenticated", 1), ("rest", "permission_denied", 1)):
        line = f'nann_requests_total{{api="{api}",code="{code}",method="refused",model="nann"}} {count:.1f}'
        assert line in text
    assert 'api="grpc",code="unauthenticated",method="refused"' in text
    logged = stream.getvalue()
    for secret in (wrong, *KEYS.values()):
        assert secret not in logged
        assert secret not in text


@pytest.mark.usefixtures("_own_logging")
@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_the_log_names_the_caller(tmp_path: Path, transport: str) -> None:
    settings = {"api_keys_file": keys_file(tmp_path), "access_log": True}
    async with Transports(tmp_path, FakeEngine(), **settings).open() as world:  # type: ignore[arg-type]
        stream = io.StringIO()
        configure_logging(level="info", log_format="json", stream=stream)
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        for role in (Role.WRITE, Role.READ):
            headers = {**bearer(role), **trace, "x-request-id": f"r-{role.name}"}
            if transport == "rest":
                await world.http.post("/retrieve", json=QUERY, headers=headers)
            else:
                request = pb.RetrieveRequest(user_id=pb.Id(number=1))
                await world.native.Retrieve(request, metadata=tuple(headers.items()))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    found = [(line["caller"], line["request_id"]) for line in lines if line["event"] == "request"]
    assert found == [("WRITE", "r-WRITE"), ("READ", "r-READ")]
    assert all(line["trace_id"] == "0af7651916cd43dd8448eb211c80319c" for line in lines if "caller" in line)
    assert all(line["parent_id"] == "b7ad6b7169203331" for line in lines if "caller" in line)


def test_a_path_that_nobody_has_thought_of_needs_a_key() -> None:
    access = Access((ApiKey("a", Role.READ, b""),), open_metrics=True, open_docs=True)
    for path in ("/new", "/metricsx", "/docs-assets", "/livez/x", "", "/v1/models/x"):
        assert role_of("GET", path, access) is Role.READ
    assert grpc_access.role_of("/x.Y/Z", access) is Role.ADMIN
    service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    assert grpc_access.role_of(f"/{service}x/Check", access) is Role.ADMIN


def test_without_keys_nothing_is_guarded(tmp_path: Path) -> None:
    app = create_app(cast("Any", None), Settings(repository=tmp_path), Health(), Metrics(), Access())
    assert Guard not in [middleware.cls for middleware in app.user_middleware]


async def test_a_key_taken_out_of_the_file_is_refused_by_both_transports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "_PAUSE_S", 0.0)
    path = keys_file(tmp_path)
    async with Transports(tmp_path, FakeEngine(), api_keys_file=path).open() as world:
        old, new = bearer(Role.READ), {"authorization": "Bearer a-new-key-of-the-reader-01"}
        request = pb.RetrieveRequest(user_id=pb.Id(number=1), k=3)

        async def codes(headers: dict[str, str]) -> tuple[int, str]:
            rest = await world.http.post("/retrieve", json=QUERY, headers=headers)
            call = world.native.Retrieve(request, metadata=tuple(headers.items()))
            return rest.status_code, (await grpc_code(call))[0]

        assert await codes(old) == (200, "OK")
        path.write_text("reader read a-new-key-of-the-reader-01\n", encoding="utf-8")
        assert await codes(old) == (401, "UNAUTHENTICATED")
        assert await codes(new) == (200, "OK")
        path.unlink()
        assert await codes({}) == (401, "UNAUTHENTICATED")
        assert await codes(new) == (200, "OK")
