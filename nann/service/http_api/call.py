"""What every REST route shares: reading the body, request id, hang-ups, errors and metrics.

A route is a plain coroutine from a `Call` to a JSON-like value; it raises `RetrievalError` and knows
nothing of statuses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from nann.service.errors import INTERNAL, ErrorRow, PayloadTooLarge, error_row, retry_after_seconds
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.tracing import Tracing
from nann.service.wire.checks import bounded_message
from nann.service.wire.rest_json import MalformedJson, body_of_error, load_json

__all__ = ["JSON", "Call", "Routes", "described", "error_parts", "error_response", "json_response"]

JSON: Final = "application/json"
# nginx's word for "the client went away"; nobody reads it.
_CLIENT_CLOSED: Final = 499

log = get_logger(__name__)


class UnsupportedMediaType(ValueError):
    """The body says that it is something other than JSON."""


class _ClientGone(Exception):
    """The caller hung up before the answer was ready."""


# Failures of HTTP itself, before there is a request that the error table could speak of.
_HTTP_ROWS: Final[dict[type[BaseException], ErrorRow]] = {
    MalformedJson: ErrorRow("malformed_json", 400, "INVALID_ARGUMENT", 400, "INVALID_ARGUMENT"),
    UnsupportedMediaType: ErrorRow(
        "unsupported_media_type", 415, "INVALID_ARGUMENT", 415, "INVALID_ARGUMENT"
    ),
}


@dataclass(slots=True)
class Call:
    """One request: `body` is the parsed JSON (None for a route that takes none).

    The route sets `model` to the name the request gave, for the metrics.
    """

    request: Request
    request_id: str
    body: Any = None
    model: str | None = None


Route = Callable[[Call], Awaitable[Any]]
ErrorForm = Callable[[BaseException, str], Response]


@dataclass(frozen=True, slots=True)
class Routes:
    """Answers requests through routes."""

    metrics: Metrics
    max_body_bytes: int
    access_log: bool
    service: RetrievalService
    tracing: Tracing | None = None

    async def answer(
        self,
        request: Request,
        method: str,
        route: Route,
        *,
        searches: bool = False,
        reads_body: bool = False,
        parse: Callable[[bytes], Any] | None = None,
        error_form: ErrorForm | None = None,
    ) -> Response:
        """The response of `route`; `method` is its name in the metrics, and `searches` says it needs a lane.

        A call that would be refused whatever it holds is refused unread. The body must say that it is JSON,
        unless a `parse` of the route's own reads it whatever it says.
        """
        start_s = time.perf_counter()
        call = Call(request, request.state.request_id)
        code, status = "cancelled", _CLIENT_CLOSED
        span = None
        if self.tracing is not None:
            span = self.tracing.begin(
                method, request.headers.get, http_method=request.method, request_id=call.request_id
            )
        try:
            self.service.refuse_unread(searches=searches)
            if parse is not None:
                call.body = parse(await self._read(request))
            elif reads_body:
                _check_media_type(request.headers.get("content-type"))
                call.body = load_json(await self._read(request))
            answer = await _unless_gone(request, route(call))
            response = answer if isinstance(answer, Response) else json_response(answer)
            code, status = "ok", response.status_code
        except (_ClientGone, ClientDisconnect):
            response = Response(status_code=_CLIENT_CLOSED)
        except Exception as error:
            row, _ = described(error)
            code = row.code
            if row is INTERNAL:
                log.exception("request failed", method=method)
            response = (error_form or error_response)(error, call.request_id)
            status = response.status_code
        finally:
            duration_s = time.perf_counter() - start_s
            self.metrics.observe_request(
                api="rest", method=method, model=call.model, code=code, duration_s=duration_s
            )
            if self.access_log:
                log.info("request", api="rest", method=method, code=code, duration_ms=duration_s * 1e3)
            if span is not None:
                model = self.metrics.model_label(call.model)
                span.end(code, failed=status >= 500, model=model, http_status=status)
        return response

    async def _read(self, request: Request) -> bytes:
        """The body, refused before it is read where its length is stated, while it is read otherwise."""
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            # A few compressed bytes could be any amount of memory.
            raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
        stated = request.headers.get("content-length")
        if stated is not None and stated.isdigit() and int(stated) > self.max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.max_body_bytes:
                raise self._too_large()
            chunks.append(chunk)
        return b"".join(chunks)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self.max_body_bytes} bytes")


def json_response(body: Any, status: int = 200) -> Response:
    """`body` as JSON; NumPy scalars in it are numbers."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(content, status, media_type=JSON)


def error_response(error: BaseException, request_id: str) -> Response:
    """The native error body with its status, and Retry-After where waiting helps."""
    status, body, retry_after_s = error_parts(error, request_id)
    response = Response(body, status, media_type=JSON)
    if retry_after_s is not None:
        response.headers["retry-after"] = str(retry_after_s)
    return response


def error_parts(error: BaseException, request_id: str) -> tuple[int, bytes, int | None]:
    """What an `error_response` is made of: status, body, seconds of Retry-After."""
    row, message = described(error)
    body = orjson.dumps(body_of_error(row.code, message, request_id))
    return row.http_status, body, retry_after_seconds(error)


def described(error: BaseException) -> tuple[ErrorRow, str]:
    """The row of a failure, be it of HTTP itself, and the text that a caller may read."""
    message = str(error) if type(error) in _HTTP_ROWS else bounded_message(error)
    return _HTTP_ROWS.get(type(error)) or error_row(error), message


def _check_media_type(content_type: str | None) -> None:
    media_type = (content_type or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("send JSON, with the header Content-Type: application/json")


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; cancels it and raises _ClientGone when the caller hangs up first."""
    # Not a task for `work` too: what it does on the way back would wait for more turns of the loop.
    asking = asyncio.current_task()
    assert asking is not None
    ended = hung_up = False

    def hang_up(watch: asyncio.Task[None]) -> None:
        nonlocal hung_up
        if not (watch.cancelled() or ended):
            hung_up = True
            asking.cancel()

    watch = asyncio.ensure_future(_disconnected(request))
    watch.add_done_callback(hang_up)
    try:
        return await work
    except asyncio.CancelledError:
        if hung_up and not asking.uncancel():
            raise _ClientGone from None
        raise
    finally:
        ended = True
        watch.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
