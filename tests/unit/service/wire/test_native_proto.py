from __future__ import annotations

import contextlib
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from nann.engine.errors import InvalidQuery, UnknownUser
from nann.engine.types import Hits
from nann.service.pb import retrieval_pb2 as pb
from nann.service.types import RetrieveReply, RetrieveRequest
from nann.service.wire.native_proto import (
    batch_response,
    ids_of_proto,
    request_of_proto,
    response_of_reply,
    value_of_proto,
    write_value,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)


@given(
    st.lists(IDS, min_size=30, max_size=34) | st.lists(st.text(), min_size=30, max_size=34),
    st.randoms(use_true_random=False),
)
def test_hits_are_the_same_bytes_few_or_many(item_ids: list[Any], random: Any) -> None:
    """Many numbers are written together, few and texts one by one."""
    scores = [random.choice((random.gauss(0, 1), random.randrange(9), float("-inf"))) for _ in item_ids]
    reply = RetrieveReply(Hits(item_ids, scores, n_scored=0, steps=0), "", 0, {}, ())
    one_by_one = pb.RetrieveResponse()
    for item_id, score in zip(item_ids, scores, strict=True):
        hit = one_by_one.items.add(score=score)
        setattr(hit.item_id, "text" if isinstance(item_id, str) else "number", item_id)
    assert response_of_reply(reply).SerializeToString() == one_by_one.SerializeToString()


@given(st.lists(IDS | st.just(0), max_size=5) | st.lists(IDS | st.text(max_size=2), max_size=5))
def test_ids_round_trip(ids: list[Any]) -> None:
    message = pb.RecordEventsRequest()
    for value in ids:
        setattr(message.item_ids.add(), "text" if isinstance(value, str) else "number", value)
    read = ids_of_proto(pb.RecordEventsRequest.FromString(message.SerializeToString()).item_ids, "item_ids")
    assert [(type(value), value) for value in read] == [(type(value), value) for value in ids]


@given(JSON)
def test_values_round_trip(value: Any) -> None:
    message = pb.Value()
    write_value(value, message)
    assert value_of_proto(pb.Value.FromString(message.SerializeToString()), "x") == value


def test_integers_beyond_doubles_stay_exact() -> None:
    message = pb.Value()
    write_value(2**53 + 1, message)
    assert value_of_proto(message, "x") == 2**53 + 1


def test_what_has_no_wire_form_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="set"):
        write_value({1}, pb.Value())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.RetrieveRequest(user_id=pb.Id()), "user_id: an id needs either number or text"),
        (pb.RetrieveRequest(history=pb.IdList(ids=[pb.Id(number=1), pb.Id()])), r"history\[1\]: an id needs"),
        (pb.RetrieveRequest(exclude_ids=[pb.Id()]), r"exclude_ids\[0\]"),
        (
            pb.RetrieveRequest(comm_seq=pb.EmbeddedHistory(values=[0, float("nan")])),
            "element 1 is not a finite",
        ),
        (
            pb.RetrieveRequest(comm_seq=pb.EmbeddedHistory(values=[float("-inf")])),
            "element 0 is not a finite",
        ),
        (pb.RetrieveRequest(filter=pb.ValueMap(entries={"a": pb.Value()})), r"filter\.a: a value of no kind"),
        (
            pb.RetrieveRequest(filter=pb.ValueMap(entries={"a": pb.Value(double_value=float("nan"))})),
            r"filter\.a: not a finite number",
        ),
    ],
)
def test_malformed_requests_name_the_field(message: pb.RetrieveRequest, text: str) -> None:
    with pytest.raises(InvalidQuery, match=text):
        request_of_proto(message)


def test_what_is_not_set_is_not_given() -> None:
    assert request_of_proto(pb.RetrieveRequest()) == RetrieveRequest(exclude_ids=[])
    assert request_of_proto(pb.RetrieveRequest(history=pb.IdList())).history == []
    assert request_of_proto(pb.RetrieveRequest(k=0)).k == 0


@given(st.binary(max_size=120))
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    try:
        message = pb.RetrieveRequest.FromString(raw)
    except DecodeError:
        return
    with contextlib.suppress(InvalidQuery):
        assert isinstance(request_of_proto(message), RetrieveRequest)


def test_an_error_takes_its_place_in_a_batch() -> None:
    response = batch_response([UnknownUser("no user 9 here")], [RetrieveRequest(user_id=9)], {"NOT_FOUND": 5})
    (result,) = response.results
    assert result.WhichOneof("outcome") == "error"
    assert (result.error.code, result.error.message, result.error.grpc_code) == (
        "unknown_user",
        "no user 9 here",
        5,
    )
