from __future__ import annotations

import contextlib
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from nann.engine.errors import InvalidQuery, UnknownUser
from nann.service.pb import retrieval_pb2 as pb
from nann.service.types import RetrieveRequest
from nann.service.wire.native_proto import batch_response, request_of_proto, value_of_proto, write_value

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


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
