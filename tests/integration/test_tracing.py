"""Traces of requests over both transports, and what reaches a collector."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from fake_engine import FakeEngine
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind
from transports import Transports
from typing_extensions import override

from nann.engine.errors import BackendError
from nann.service.logs import configure_logging, get_logger
from nann.service.pb import retrieval_pb2 as pb
from nann.service.settings import Settings
from nann.service.tracing import Tracing, current_request, open_tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "shop=7"}
QUERY = {"user_id": 1, "k": 3}
REQUEST = pb.RetrieveRequest(user_id=pb.Id(number=1), k=3)


class Traced:
    """A server whose spans are kept here."""

    def __init__(self, directory: Path, **provider: Any) -> None:
        self._spans = InMemorySpanExporter()
        made = TracerProvider(shutdown_on_exit=False, **provider)
        made.add_span_processor(SimpleSpanProcessor(self._spans))
        self.engine = FakeEngine()
        self.world = Transports(directory, self.engine, tracing=Tracing(made))

    def take(self) -> dict[str, ReadableSpan]:
        """What ended since the last call, by name."""
        spans = self._spans.get_finished_spans()
        self._spans.clear()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}


@pytest.fixture
async def traced(tmp_path: Path) -> AsyncIterator[Traced]:
    made = Traced(tmp_path)
    async with made.world.open():
        yield made


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


async def ask(world: Transports, api: str, headers: dict[str, str]) -> None:
    if api == "rest":
        await world.http.post("/retrieve", json=QUERY, headers=headers)
    else:
        with suppress(grpc.aio.AioRpcError):
            await world.native.Retrieve(REQUEST, metadata=tuple(headers.items()))


METHODS = {"rest": "retrieve", "grpc": "Retrieve"}


@pytest.mark.parametrize("api", METHODS)
async def test_a_request_goes_on_in_its_callers_trace(traced: Traced, api: str) -> None:
    await ask(traced.world, api, {**CALLER, "x-request-id": "mine"})
    spans = traced.take()
    assert set(spans) == {METHODS[api], "user_store", "queue", "search"}
    request = spans.pop(METHODS[api])
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert request.context.trace_state.get("shop") == "7"
    attributes = dict(request.attributes or {})
    assert attributes.pop("nann.request_id") == "mine"
    own = {
        "rest": {"http.request.method": "POST", "http.response.status_code": 200},
        "grpc": {"rpc.system.name": "grpc", "rpc.response.status_code": "OK"},
    }[api]
    assert attributes == {"nann.model": "nann", **own}
    assert request.status.is_unset
    for child in spans.values():
        assert child.parent is not None
        assert child.parent.span_id == request.context.span_id
        assert child.context.trace_id == request.context.trace_id
        assert child.start_time is not None
        assert child.end_time is not None
        assert request.start_time is not None
        assert request.end_time is not None
        assert child.start_time <= child.end_time <= request.end_time


async def test_a_search_says_what_it_cost_and_nothing_says_who_asked(traced: Traced) -> None:
    await ask(traced.world, "rest", {})
    spans = traced.take()
    search = dict(spans["search"].attributes or {})
    assert search == {
        "nann.model": "nann", "nann.version": 1, "nann.policy": "best_first", "nann.n_scored": 100,
        "nann.steps": 3, "nann.batch_size": 1, "nann.dispatched_by": "lane_free",
    }  # fmt: skip
    assert spans["queue"].end_time is not None
    assert spans["search"].start_time is not None
    assert abs(spans["queue"].end_time - spans["search"].start_time) < 1e6  # ns, by two readings of a clock
    names = {name for span in spans.values() for name in span.attributes or {}}
    assert not [name for name in names if "user" in name or "item" in name or "history" in name]


@pytest.mark.usefixtures("_own_logging")
async def test_without_a_caller_a_trace_begins_and_the_log_has_it(traced: Traced) -> None:
    stream = io.StringIO()
    configure_logging(level="info", log_format="json", stream=stream)
    traced.engine.search_error = BackendError("lost")
    await ask(traced.world, "rest", {})
    request = traced.take()["retrieve"]
    assert request.parent is None
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "search failed"]
    assert line["trace_id"] == f"{request.context.trace_id:032x}"
    assert line["span_id"] == f"{request.context.span_id:016x}"
    get_logger("after").info("after")
    assert "trace_id" not in json.loads(stream.getvalue().splitlines()[-1])


@pytest.mark.parametrize("api", METHODS)
async def test_a_failure_of_the_server_is_one_in_its_trace_and_a_callers_is_not(
    traced: Traced, api: str
) -> None:
    traced.engine.search_error = BackendError("lost")
    await ask(traced.world, api, {})
    request = traced.take()[METHODS[api]]
    assert not request.status.is_ok
    assert not request.status.is_unset
    assert (request.attributes or {})["error.type"] == "backend_error"
    traced.engine.search_error = None
    if api == "rest":
        await traced.world.http.post("/retrieve", json={"k": 3, "model": "x" * 1000})
    else:
        with suppress(grpc.aio.AioRpcError):
            await traced.world.native.Retrieve(pb.RetrieveRequest(k=3, model="x" * 1000))
    request = traced.take()[METHODS[api]]
    assert request.status.is_unset
    assert (request.attributes or {})["error.type"] in ("unknown_model", "invalid_query")
    assert (request.attributes or {})["nann.model"] == "unknown"


async def test_queries_of_one_call_are_children_of_it(traced: Traced) -> None:
    await traced.world.http.post("/retrieve", json={"queries": [{"history": [1], "k": 2}] * 3})
    spans = traced._spans.get_finished_spans()
    assert sorted(span.name for span in spans) == ["queue"] * 3 + ["retrieve"] + ["search"] * 3
    assert len({span.context.trace_id for span in spans}) == 1


async def test_probes_and_metrics_are_not_traced(traced: Traced) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert (await traced.world.http.get(path)).status_code == 200
    assert not traced.take()
    assert current_request() is None


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "é"])
async def test_a_header_that_is_no_trace_begins_one(traced: Traced, header: str) -> None:
    await traced.world.http.post("/retrieve", json=QUERY, headers={"traceparent": header.encode()})
    assert traced.take()["retrieve"].parent is None


async def test_what_the_caller_does_not_sample_is_not_recorded(tmp_path: Path) -> None:
    traced = Traced(tmp_path, sampler=ParentBased(root=ALWAYS_OFF))
    async with traced.world.open():
        await ask(traced.world, "rest", {})
        await ask(traced.world, "rest", {"traceparent": f"00-{TRACE}-{PARENT}-00"})
        assert not traced.take()
        await ask(traced.world, "rest", CALLER)
        assert "search" in traced.take()


# What leaves the process


class Collector(HTTPServer):
    """Takes spans over OTLP's HTTP form."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: list[str] = []


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as opened:
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def test_spans_reach_the_collector_that_the_standard_variables_name(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracing = open_tracing(Settings(repository=tmp_path, tracing="otlp"))
    assert tracing is not None
    tracing.begin("retrieve", CALLER.get).end("ok", failed=False)
    tracing.close()
    assert collector.paths == ["/v1/traces"]
    (resource_spans,) = collector.requests[0].resource_spans
    resource = {pair.key: pair.value.string_value for pair in resource_spans.resource.attributes}
    assert resource["service.name"] == "nann"
    assert resource["deployment.environment.name"] == "test"
    (span,) = resource_spans.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("retrieve", TRACE, PARENT)


def test_a_collector_that_is_away_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nann.service.tracing._FLUSH_S", 0.1)
    # An address that takes a connection and says nothing.
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        tracing = open_tracing(Settings(repository=tmp_path, tracing="otlp"))
        assert tracing is not None
        tracing.begin("retrieve", CALLER.get).end("ok", failed=False)
        tracing.close()  # it would take as long as the exporter tries
        assert any(thread.name == "nann-tracing-close" for thread in threading.enumerate())
    for thread in threading.enumerate():
        if thread.name in ("nann-tracing-close", "OtelBatchSpanRecordProcessor"):
            thread.join(10)
