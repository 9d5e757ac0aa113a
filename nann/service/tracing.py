"""Traces: a span for each request, and one for each thing that its queries waited for.

Off by default, and then OpenTelemetry's SDK is not even imported. The span of the request in progress is a
context variable, as its id in the log is: a use case tells it how long a stage took and knows nothing of
transports. A span holds names of models, counts and times, never an id of a user or an item.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from nann.service.logs import get_logger
from nann.service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

__all__ = ["RequestSpan", "Tracing", "current_request", "open_tracing"]

Attribute: TypeAlias = str | int | float | bool

# W3C Trace Context. Baggage is not for us, and no other form is understood.
_HEADERS: Final = ("traceparent", "tracestate")
# The semantic conventions' names of what we tell; all else is nann.….
_NAMES: Final = {
    "http_method": "http.request.method",
    "http_status": "http.response.status_code",
    "rpc_system": "rpc.system.name",
    "rpc_status": "rpc.response.status_code",
}
# Of the time that a pod has to end; a collector that does not answer must not use it up.
_FLUSH_S: Final = 2.0

log = get_logger(__name__)
_current: ContextVar[RequestSpan | None] = ContextVar("nann_request_span", default=None)


def current_request() -> RequestSpan | None:
    """The span of the request in progress, None outside of one and where nothing is traced."""
    return _current.get()


class Tracing:
    """Begins the spans of requests with OpenTelemetry's `provider`, and closes it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("nann", version("nann"))
        self._extract = TraceContextTextMapPropagator().extract

    def begin(self, method: str, header: Callable[[str], str | None], **attributes: Attribute) -> RequestSpan:
        """Begin the span of a request, in the caller's trace where its headers name one.

        `method` is the name in the metrics; `header` gives what the caller sent under a name. Whoever
        begins a span must `end` it, in the same context.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        sent = {name: value for name in _HEADERS if (value := header(name)) is not None}
        parent = self._extract(sent, Context())
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, _named(attributes))
        return RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what has not been sent yet, for two seconds at most. Blocks."""
        closing = threading.Thread(target=self._provider.shutdown, name="nann-tracing-close", daemon=True)
        closing.start()
        closing.join(_FLUSH_S)
        if closing.is_alive():
            log.warning("the last traces were not sent: the collector does not answer")


class RequestSpan:
    """The span of one request in progress. The log has its ids until it ends."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._token = _current.set(self)
        ids = span.get_span_context()
        self._log_tokens = structlog.contextvars.bind_contextvars(
            trace_id=f"{ids.trace_id:032x}", span_id=f"{ids.span_id:016x}"
        )

    def record(
        self, stage: str, duration_s: float, *, ago_s: float = 0.0, **attributes: Attribute | None
    ) -> None:
        """A child span of a stage that took so long and ended `ago_s` ago."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        if not self._span.is_recording():
            return
        end_ns = time.time_ns() - round(ago_s * 1e9)
        self._tracer.start_span(
            stage,
            set_span_in_context(self._span, Context()),
            attributes=_named(attributes),
            start_time=end_ns - round(duration_s * 1e9),
        ).end(end_ns)

    def end(self, code: str, *, failed: bool, **attributes: Attribute | None) -> None:
        """End it with the code of the metrics; `failed` when the failure is the server's own."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(_named(attributes))
        if code != "ok":
            self._span.set_attribute("error.type", code)
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
        structlog.contextvars.reset_contextvars(**self._log_tokens)
        _current.reset(self._token)


def _named(attributes: Mapping[str, Attribute | None]) -> dict[str, Attribute]:
    """Attributes by the names that OpenTelemetry gives them, others as our own; without the unknown ones."""
    return {_NAMES.get(key, f"nann.{key}"): value for key, value in attributes.items() if value is not None}


def open_tracing(settings: Settings) -> Tracing | None:
    """The tracing that the settings ask for, None for none.

    Raises SettingsError when OpenTelemetry is not installed, or its variables ask for what it does not have.
    """
    if settings.tracing == "off":
        return None
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter()
    except ImportError as error:
        raise SettingsError(
            f"--tracing {settings.tracing} needs OpenTelemetry ({error}): pip install 'nann[otel]'"
        ) from None
    of_operator = OTELResourceDetector().detect().attributes
    ours = {"service.name": "nann", "service.version": version("nann")}
    resource = Resource.create({name: text for name, text in ours.items() if name not in of_operator})
    # It does not become the process's provider: libraries would begin to trace themselves, too.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporter() -> SpanExporter:
    """What sends spans, by the variables of OpenTelemetry, which its classes read."""
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        return OverHttp()
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc()
    raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: it may be http/protobuf or grpc")
