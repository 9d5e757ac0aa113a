"""What every gRPC method shares: reading the message, request id, deadline, errors and metrics.

A servicer method is a plain coroutine from a `Call` to a reply message; it raises `RetrievalError` and
knows nothing of statuses. Messages are parsed here and not by gRPC, so that bytes that are no message
are the caller's mistake (INVALID_ARGUMENT) and not ours.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from nann.engine.errors import InvalidQuery, Overloaded
from nann.service.errors import INTERNAL, error_row
from nann.service.logs import bind_request, get_logger
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.tracing import Tracing
from nann.service.wire.checks import bounded_message, request_id_of

__all__ = [
    "ERROR_CODE_KEY",
    "REQUEST_ID_KEY",
    "Call",
    "CallLimit",
    "Method",
    "Methods",
    "or_invalid_argument",
]

REQUEST_ID_KEY: Final = "x-request-id"
TRACEPARENT_KEY: Final = "traceparent"
# Understood by gRPC's own retry policies (proposal A6, "Pushback").
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
# The stable word of the error table: several of its rows share a status, and a client tells them apart.
ERROR_CODE_KEY: Final = "nann-error-code"

# A failure of the server's own (OpenTelemetry's conventions for the span status of gRPC servers).
_FAILURES: Final = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")

# Those that wait for a lane.
_SEARCHES: Final = frozenset({"Retrieve", "BatchRetrieve", "Predict"})

log = get_logger(__name__)


class CallLimit:
    """Lets in `most` calls at a time, and refuses the others as overload that says when to come back."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._n = 0

    def __enter__(self) -> None:
        if self._n >= self._most:
            raise Overloaded(f"{self._most} calls are in progress")
        self._n += 1

    def __exit__(self, *_: object) -> None:
        self._n -= 1


@dataclass(slots=True)
class Call:
    """One request: its message and its deadline (``time.monotonic()`` seconds, None when it has none).

    The method sets `model` to the name the request gave, for the metrics.
    """

    message: Any
    deadline_s: float | None
    model: str | None = None


Method = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Methods:
    """Turns coroutines into the generic handler of a service.

    `in_progress` are the tasks of calls that have been accepted and whose answer has not been sent.
    """

    metrics: Metrics
    access_log: bool
    limit: CallLimit
    service: RetrievalService
    tracing: Tracing | None = None
    in_progress: set[asyncio.Task[Any]] = field(default_factory=set)

    def handler(
        self,
        service: str,
        methods: Mapping[str, tuple[type[Any], Method]],
        *,
        tensorflow_codes: bool = False,
    ) -> grpc.GenericRpcHandler:
        """The handler of `service`: for each method name the class of its request, and what answers it."""

        def unary(name: str, request_class: type[Any], method: Method) -> grpc.RpcMethodHandler:
            async def answer(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return await self._answer(raw, context, name, request_class, method, tensorflow_codes)

            return grpc.unary_unary_rpc_method_handler(answer)

        return grpc.method_handlers_generic_handler(
            service, {name: unary(name, *definition) for name, definition in methods.items()}
        )

    async def _answer(
        self,
        raw: bytes,
        context: grpc.aio.ServicerContext,
        name: str,
        request_class: type[Any],
        method: Method,
        tensorflow_codes: bool,
    ) -> bytes:
        start_s = time.perf_counter()
        request_id = request_id_of(_metadata_value(context, REQUEST_ID_KEY))
        call = Call(None, _deadline_s(context))
        code = "cancelled"
        failure: Exception | None = None
        reply = b""
        # gRPC runs a call in one task, which ends with it.
        bind_request(request_id, _metadata_value(context, TRACEPARENT_KEY))
        span = None
        if self.tracing is not None:
            span = self.tracing.begin(
                name,
                functools.partial(_metadata_value, context),
                rpc_system="grpc",
                request_id=request_id,
            )
        try:
            with self.limit:
                self.service.refuse_unread(searches=name in _SEARCHES)
                self._note_accepted()
                call.message = _parse(request_class, raw)
                reply = (await method(call)).SerializeToString()
            code = "ok"
        except asyncio.CancelledError:
            # The caller hung up, or its deadline passed: gRPC itself has answered.
            raise
        except Exception as error:
            failure, code = error, error_row(error).code
            if error_row(error) is INTERNAL:
                log.exception("request failed", method=name)
        finally:
            duration_s = time.perf_counter() - start_s
            self.metrics.observe_request(
                api="grpc", method=name, model=call.model, code=code, duration_s=duration_s
            )
            if self.access_log:
                log.info("request", api="grpc", method=name, code=code, duration_ms=duration_s * 1e3)
            if span is not None:
                status = "OK" if code == "ok" else "CANCELLED"
                if failure is not None:
                    row = error_row(failure)
                    status = row.tf_grpc_code if tensorflow_codes else row.grpc_code
                model = self.metrics.model_label(call.model)
                span.end(code, failed=status in _FAILURES, model=model, rpc_status=status)
        trailer: tuple[tuple[str, str], ...] = ((REQUEST_ID_KEY, request_id),)
        if failure is None:
            context.set_trailing_metadata(trailer)
            return reply
        row = error_row(failure)
        trailer += ((ERROR_CODE_KEY, row.code),)
        if isinstance(failure, Overloaded):
            trailer += ((_PUSHBACK_KEY, str(round(failure.retry_after_s * 1e3))),)
        status = grpc.StatusCode[row.tf_grpc_code if tensorflow_codes else row.grpc_code]
        message = bounded_message(failure)
        if row is INTERNAL:
            message = f"{message}, request id {request_id}"
        await context.abort(status, message, trailer)
        raise AssertionError("abort returned")

    def _note_accepted(self) -> None:
        # gRPC runs a call in one task, from its message to the last byte of its answer.
        task = asyncio.current_task()
        assert task is not None
        self.in_progress.add(task)
        task.add_done_callback(self.in_progress.discard)


def _parse(request_class: type[Any], raw: bytes) -> Any:
    try:
        return request_class.FromString(raw)
    except DecodeError:
        raise InvalidQuery(f"the bytes sent are not a {request_class.__name__}") from None


async def or_invalid_argument(context: grpc.aio.ServicerContext, request_class: type[Any], raw: bytes) -> Any:
    """The message of `raw`, for services that have no `Methods`; ends the call when it is none."""
    try:
        return _parse(request_class, raw)
    except InvalidQuery as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _metadata_value(context: grpc.aio.ServicerContext, key: str) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return str(value)
    return None


def _deadline_s(context: grpc.aio.ServicerContext) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s
