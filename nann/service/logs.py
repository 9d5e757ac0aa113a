"""Logging: structlog for our own lines and for those of uvicorn and gRPC, on standard error.

JSON lines by default; readable ones on a terminal. A request id bound by `request_context` is on
every line written while that request runs, whichever task writes it.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import structlog

__all__ = ["configure_logging", "get_logger", "new_request_id", "request_context"]


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
        [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
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


def get_logger(name: str) -> Any:
    """A structured logger: ``log.info("event words", key=value)``."""
    return structlog.stdlib.get_logger(name)


def new_request_id() -> str:
    """A fresh random request id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Put `request_id` on every log line written inside the block."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield
