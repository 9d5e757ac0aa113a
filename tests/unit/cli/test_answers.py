"""One form of answer whatever the transport, and a refusal in the server's own words."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from nann.cli.answers import AskError, _request, ask_rest, parse_id
from nann.cli.output import console
from nann.cli.query import answer_table, timing_line

ANSWER = {
    "items": [
        {"item_id": 7, "score": 1.25, "attributes": {"title": "Alien (1979)", "category": None}},
        {"item_id": 9, "score": -0.5, "attributes": {}},
    ],
    "model": "nann",
    "version": 3,
    "n_scored": 6120,
    "timings_ms": {"queue": 0.25, "search": 4.0},
    "notes": [],
}


def _client(status: int, body: Any, seen: list[Any] | None = None) -> httpx.Client:
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body))

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(handle))


def test_rest_sends_the_body_and_returns_the_answer() -> None:
    seen: list[Any] = []
    with _client(200, ANSWER, seen) as client:
        assert ask_rest(client, {"user_id": "a", "k": 2}) == ANSWER
    assert seen == [("/retrieve", {"user_id": "a", "k": 2})]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, {"error": {"code": "unknown_user", "message": "no user 5"}}, "unknown_user: no user 5"),
        (502, b"<html>", "502 without a JSON object"),
        (500, {}, "500"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(status: int, body: Any, words: str) -> None:
    with _client(status, body) as client, pytest.raises(AskError, match=words):
        ask_rest(client, {"user_id": 5})


def test_the_grpc_request_says_the_same_as_the_body() -> None:
    from nann.service.wire.native_proto import request_of_proto

    body = {
        "history": [3, "x"],
        "k": 5,
        "profile": "fast",
        "model": "nann",
        "params": {"policy": "level", "level_topn": [1, 2, 3, 4, 5, 6]},
        "with_attributes": True,
        "explain": True,
    }
    request = request_of_proto(_request(body))
    assert list(request.history or ()) == [3, "x"]
    assert request.user_id is None
    assert (request.k, request.profile, request.model) == (5, "fast", "nann")
    assert request.params is not None
    assert (request.params.policy, request.params.level_topn) == ("level", (1, 2, 3, 4, 5, 6))
    assert request.with_attributes
    assert request.explain
    assert request_of_proto(_request({"user_id": -4})).user_id == -4


@pytest.mark.parametrize(
    ("text", "as_text", "expected"),
    [("12", False, 12), ("-3", False, -3), ("12", True, "12"), ("a1", False, "a1"), ("-", False, "-")],
)
def test_digits_are_integers_unless_told_otherwise(text: str, as_text: bool, expected: int | str) -> None:
    assert parse_id(text, as_text=as_text) == expected


def test_titles_are_shown_where_the_model_knows_any(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(answer_table(ANSWER))
    out = capsys.readouterr().out
    assert "Alien (1979)" in out
    assert "nann, version 3" in out
    assert "category" not in out, "a column that is empty everywhere is left out"
    assert timing_line(ANSWER) == "6,120 items scored, queue 0.2 ms, search 4.0 ms"
