"""Logging: structlog for our own lines and for those of uvicorn and gRPC, on standard error.

JSON lines by default; readable ones on a terminal. A request id bound by `request_context` is on
every line written while that request runs, whichever task writes it.
"""

from __future__ import annotations

import logging
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

import structlog

__all__ = [
    "bind_caller",
    "bind_request",
    "caller_context",
    "configure_logging",
    "get_logger",
    "new_request_id",
    "request_context",
]

# Seeded by the system, which is not asked again for each id.
_IDS: Final = random.Random()
# W3C Trace Context, "traceparent": version, trace id, parent id, flags. Of a version we do not know, what it
# shares with this one counts, as the recommendation says.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?"
)


def configure_logging(*, level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Set up the process's logging.

    `level` is a standard name (``info``); `log_format` is ``json``, ``console`` or ``auto`` (console
    exactly when `stream`, by default standard error, is a terminal).
    """
    stream = stream or sys.stderr
    on_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=not on_console),
    ]
    renderer: list[structlog.typing.Processor] = (
        [_console(colors=stream.isatty())]
        if on_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # uvicorn says "Started server process" and the like at info; our own lines say it once.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _console(*, colors: bool) -> structlog.dev.ConsoleRenderer:
    # Its default shows the local variables of every frame, and with them histories and keys.
    return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)


def get_logger(name: str) -> Any:
    """A structured logger: ``log.info("event words", key=value)``."""
    return structlog.stdlib.get_logger(name)


def new_request_id() -> str:
    """A fresh random request id: 32 hexadecimal digits. Nothing is kept safe by it."""
    return f"{_IDS.getrandbits(128):032x}"


@contextmanager
def request_context(request_id: str, traceparent: str | None = None) -> Iterator[None]:
    """Put `request_id` on every log line written inside the block, and the ids of the caller's trace."""
    with structlog.contextvars.bound_contextvars(**_ids(request_id, traceparent)):
        yield


def bind_request(request_id: str, traceparent: str | None = None) -> None:
    """The same for the rest of this task."""
    structlog.contextvars.bind_contextvars(**_ids(request_id, traceparent))


def _ids(request_id: str, traceparent: str | None) -> dict[str, str]:
    ids = {"request_id": request_id}
    if traceparent is not None and (trace := _TRACEPARENT.fullmatch(traceparent)):
        ids |= {"trace_id": trace[1], "parent_id": trace[2]}
    return ids


@contextmanager
def caller_context(name: str) -> Iterator[None]:
    """Put the name of the caller's API key on every log line written inside the block."""
    with structlog.contextvars.bound_contextvars(caller=name):
        yield


def bind_caller(name: str) -> None:
    """The same for the rest of this task."""
    structlog.contextvars.bind_contextvars(caller=name)
