"""Refuses searches that no queue has room for from their heads alone, before the framework hears of them.

A server that is asked for several times what it can do refuses most of its requests. Through the framework a
refusal takes twice the processor time that it takes here, and all of it is taken from searches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from nann.engine.errors import Overloaded, RetrievalError
from nann.service.access import Access, Role, bearer_key
from nann.service.errors import error_row
from nann.service.http_api.call import JSON, error_parts
from nann.service.http_api.connection import Refusal
from nann.service.logs import caller_context, get_logger, request_context
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.wire.checks import request_id_of

__all__ = ["Turnstile"]

# The route that callers keep busy, and its name in the metrics. All others go the long way.
_SEARCH: Final = (b"POST", b"/retrieve")
_METHOD: Final = "retrieve"

log = get_logger(__name__)


class Turnstile:
    """Says what `Guard` and `Routes.answer` would say to a search that there is no room for."""

    def __init__(
        self, service: RetrievalService, access: Access | None, metrics: Metrics, *, access_log: bool
    ) -> None:
        self._service = service
        self._access = None if access is None or access.is_open else access
        self._metrics = metrics
        self._access_log = access_log
        # Requests that were let in while the loop reads, whose tasks run when it has read all that came: in a
        # crowd they are hundreds, and none of them is in the queue yet.
        self._let_in = 0
        # How long the loop read when it last did, and since when it reads now. What comes meanwhile waits as
        # long: with thousands of connections for seconds, and everyone who is then let in is late.
        self._last_reading_s = 0.0
        self._reads_since_s: float | None = None

    def refusal(self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Refusal | None:
        """The answer to a request that is refused; None: it is to go on.

        Names of `headers` are in lower case.
        """
        if (method, target) != _SEARCH:
            return None
        start_s = time.perf_counter()
        if self._reads_since_s is None:
            self._reads_since_s = start_s
            asyncio.get_running_loop().call_soon(self._has_read)
        ahead, unread_s = self._let_in, self._last_reading_s
        caller = ""
        if self._access is not None and not self._service.has_room(ahead=ahead, unread_s=unread_s):
            key = bearer_key(_sent(headers, b"authorization"), _sent(headers, b"x-api-key"))
            try:
                caller = self._access.allow(key, Role.READ)
            except RetrievalError:
                return None
        try:
            self._service.refuse_unread(searches=True, ahead=ahead, unread_s=unread_s)
        except Overloaded as error:
            return self._refusal_of(error, caller, headers, start_s)
        except RetrievalError:
            return None
        self._let_in += 1
        return None

    def _refusal_of(
        self, error: Overloaded, caller: str, headers: Sequence[tuple[bytes, bytes]], start_s: float
    ) -> Refusal:
        request_id = request_id_of(_sent(headers, b"x-request-id"))
        status, body, retry_after_s = error_parts(error, request_id)
        code, duration_s = error_row(error).code, time.perf_counter() - start_s
        self._metrics.observe_request(
            api="rest", method=_METHOD, model=None, code=code, duration_s=duration_s
        )
        if self._access_log:
            with request_context(request_id, _sent(headers, b"traceparent")), caller_context(caller):
                log.info("request", api="rest", method=_METHOD, code=code, duration_ms=duration_s * 1e3)
        # By hand: the framework's response object costs more than all else that happens to a refusal here.
        lines = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", JSON.encode()),
            (b"retry-after", b"%d" % (retry_after_s or 1)),
            (b"x-request-id", request_id.encode()),
        ]
        return Refusal(status, lines, body)

    def _has_read(self) -> None:
        """The loop has read all that came. The tasks of those that were let in run now."""
        assert self._reads_since_s is not None
        self._last_reading_s = time.perf_counter() - self._reads_since_s
        self._reads_since_s = None
        self._let_in = 0


def _sent(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The value of a header, of several the last."""
    values = [value for own, value in headers if own == name]
    return values[-1].decode("latin-1") if values else None
