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


def test_an_exception_on_a_console_shows_no_local_variables() -> None:
    stream = io.StringIO()
    configure_logging(level="info", log_format="console", stream=stream)
    secret = "a key that a caller sent"
    try:
        raise ValueError(len(secret))
    except ValueError:
        get_logger("nann.x").exception("failed")
    assert "ValueError" in stream.getvalue()
    assert secret not in stream.getvalue()


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (f"00-{'a' * 32}-{'b' * 16}-01", True),
        (f"01-{'a' * 32}-{'b' * 16}-01-more", True),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f"00-{'A' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'b' * 16}-01\n", False),
        ("", False),
        (None, False),
    ],
)
def test_the_callers_trace(sent: str | None, found: bool) -> None:
    stream = io.StringIO()
    configure_logging(level="info", log_format="json", stream=stream)
    with request_context("r-1", sent):
        get_logger("nann.x").info("searched")
    (line,) = lines(stream)
    assert line["request_id"] == "r-1"
    assert (line.get("trace_id"), line.get("parent_id")) == (("a" * 32, "b" * 16) if found else (None, None))
