from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from nann.service.logs import configure_logging, get_logger, new_request_id, request_context


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_the_request_id_while_the_request_runs() -> None:
    stream = io.StringIO()
    configure_logging(level="info", log_format="json", stream=stream)
    with request_context("r-1"):
        get_logger("nann.x").info("searched", n_scored=7)
        logging.getLogger("some.library").warning("careful: %s", "hot")
    get_logger("nann.x").info("after")
    ours, foreign, after = lines(stream)
    assert (ours["event"], ours["n_scored"], ours["request_id"], ours["level"]) == (
        "searched",
        7,
        "r-1",
        "info",
    )
    assert (foreign["event"], foreign["request_id"], foreign["logger"]) == (
        "careful: hot",
        "r-1",
        "some.library",
    )
    assert "request_id" not in after
    assert str(after["timestamp"]).endswith("Z")


def test_the_level_holds_and_exceptions_are_one_line() -> None:
    stream = io.StringIO()
    configure_logging(level="warning", log_format="auto", stream=stream)  # not a terminal: json
    log = get_logger("nann.x")
    log.info("not shown")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
    (line,) = lines(stream)
    assert line["event"] == "failed"
    assert "ValueError: boom" in str(line["exception"])


def test_console_lines_are_for_reading() -> None:
    stream = io.StringIO()
    configure_logging(level="info", log_format="console", stream=stream)
    get_logger("nann.x").info("ready", rest="http://127.0.0.1:8501")
    assert "ready" in stream.getvalue() and "rest=http://127.0.0.1:8501" in stream.getvalue()


def test_request_ids_differ() -> None:
    assert new_request_id() != new_request_id()
    assert len(new_request_id()) == 32
