from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nann.engine.errors import InvalidQuery
from nann.service.types import RetrieveRequest
from nann.service.wire.checks import bounded_message, request_id_of, user_id_of_text
from nann.service.wire.rest_json import MalformedJson, events_of_body, load_json, requests_of_body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "object|dictionary"),
        ("text", "object|dictionary"),
        ({"user": 1}, "user: unknown field"),
        ({"user_id": 1, "params": {"efs": 1}}, r"params\.efs: unknown field"),
        ({"user_id": 1.0}, "user_id: id: expected an integer or a string, found 1.0"),
        ({"user_id": True}, "user_id.*found true"),
        ({"user_id": 2**63}, "does not fit 64 bits"),
        ({"user_id": {"number": 1}}, "found an object"),
        ({"history": [1, 2.5]}, "history: element 1: expected.*found 2.5"),
        ({"history": [1, None]}, "history: element 1.*found null"),
        ({"history": "1,2"}, "history: .*list"),
        ({"history": [1], "k": "10"}, "k: .*integer"),
        ({"history": [1], "k": True}, "k: .*integer"),
        ({"history": [1], "k": 10.0}, "k: .*integer"),
        ({"history": [1], "timeout_ms": True}, "timeout_ms"),
        ({"history": [1], "timeout_ms": "50"}, "timeout_ms"),
        ({"history": [1], "strict": 1}, "strict"),
        ({"history": [1], "model": 3}, "model: .*string"),
        ({"history": [1], "filter": [1]}, "filter: .*dictionary"),
        ({"history": [1], "params": {"level_topn": [1, 2, 3.5]}}, r"params\.level_topn\[2\]"),
        ({"comm_seq": [[1, 2], [3]]}, "comm_seq: row 1 has 1 numbers, row 0 has 2"),
        ({"comm_seq": [[1, "2"]]}, "comm_seq: row 0 holds something that is not a number"),
        ({"comm_seq": [[1, False]]}, "comm_seq: row 0 holds something that is not a number"),
        ({"comm_seq": [1, 2]}, "comm_seq: row 0 is not an array"),
        ({"comm_seq": [[1e300]]}, "comm_seq: .*element 0 is not a finite number"),
        ({"queries": [{"user_id": 1}, {"user": 2}]}, r"queries\[1\]\.user: unknown field"),
        ({"queries": [{"user_id": 1}], "k": 3}, "k: unknown field"),
        ({"queries": {"user_id": 1}}, "queries: .*list"),
    ],
)
def test_wrong_bodies_name_the_field(body: Any, message: str) -> None:
    with pytest.raises(InvalidQuery, match=message):
        requests_of_body(body)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[NaN]", b"[Infinity]", b"[1e999]", b"\xff", b"[" * 5000, b"{'a': 1}"]
)
def test_what_is_not_json(text: bytes) -> None:
    with pytest.raises(MalformedJson, match="malformed JSON"):
        load_json(text)


def test_null_means_not_given() -> None:
    nothing = dict.fromkeys(
        ("user_id", "comm_seq", "k", "model", "version", "params", "profile", "include_ids", "exclude_ids")
    )
    (request,), _ = requests_of_body({"history": [1], **nothing, "filter": None, "timeout_ms": None})
    assert request == RetrieveRequest(history=[1])


def test_empty_restrictions_restrict_nothing_and_an_empty_history_is_one() -> None:
    (request,), _ = requests_of_body({"history": [], "include_ids": [], "exclude_ids": [], "filter": {}})
    assert request == RetrieveRequest(history=[])


def test_batch_form() -> None:
    requests, is_batch = requests_of_body({"queries": [{"user_id": 1}, {"user_id": "x", "k": 3}]})
    assert is_batch
    assert requests == [RetrieveRequest(user_id=1), RetrieveRequest(user_id="x", k=3)]


def test_events() -> None:
    assert events_of_body({"item_ids": [1, "b"]}) == [1, "b"]
    for body in ({}, {"item_ids": [1.5]}, {"item_ids": [], "at": 1}, [1]):
        with pytest.raises(InvalidQuery):
            events_of_body(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = ("user_id", "history", "comm_seq", "k", "params", "filter", "include_ids", "queries", "timeout_ms")


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4) | JSON)
def test_any_json_is_a_request_or_refused(body: Any) -> None:
    try:
        requests, _ = requests_of_body(body)
    except InvalidQuery as error:
        assert "Traceback" not in str(error) and "pydantic" not in str(error)
    else:
        assert all(isinstance(request, RetrieveRequest) for request in requests)


@pytest.mark.parametrize(
    ("text", "user_id"),
    [
        ("42", 42),
        ("-7", -7),
        ("0", 0),
        ("007", "007"),
        ("4.2", "4.2"),
        ("u1", "u1"),
        ("-0", "-0"),
        (str(2**63), str(2**63)),
        ("٣", "٣"),
    ],
)
def test_user_ids_of_paths(text: str, user_id: int | str) -> None:
    assert user_id_of_text(text) == user_id


def test_request_ids_fit_a_header() -> None:
    assert request_id_of("abc-1") == "abc-1"
    for bad in (None, "", "a b", "a\nb", "x" * 129, "é"):
        assert len(request_id_of(bad)) == 32


def test_messages_are_bounded() -> None:
    assert bounded_message(InvalidQuery("short")) == "short"
    assert bounded_message(InvalidQuery("x" * 5000)) == "x" * 1024 + "...TRUNCATED"
    assert bounded_message(KeyError("/secret/path")) == "internal error"
