"""Every field of the service's values has a place in every wire form; one without fails here by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nann.engine.types import Hits, Note
from nann.service.http_api import docs
from nann.service.pb import retrieval_pb2 as pb
from nann.service.types import ParamOverrides, RetrieveReply, RetrieveRequest, UserProfile
from nann.service.wire import native_proto, rest_json

COMM_SEQ = np.arange(4, dtype=np.float32)
PARAMS: dict[str, Any] = {
    "policy": "level",
    "ef": 7,
    "beam_width": 8,
    "max_steps": 9,
    "gate_width": 10,
    "gate_margin": 0.5,
    "level_topn": (1, 2, 3, 4, 5, 6),
}
REQUEST: dict[str, Any] = {
    "user_id": 42,
    "history": [1, "a"],
    "comm_seq": COMM_SEQ,
    "k": 11,
    "model": "nann",
    "version": 3,
    "params": ParamOverrides(**PARAMS),
    "profile": "fast",
    "include_ids": [1, "b"],
    "exclude_ids": [2],
    "filter": {"a": {"gte": 1}, "b": [1, 2.5, "x", None, True], "big": 2**53 + 1},
    "exclude_seen": False,
    "timeout_ms": 12.5,
    "strict": True,
    "explain": True,
    "with_attributes": False,
}
# Chosen by TensorFlow Serving's ModelSpec alone; the native contract has no labels.
ONLY_IN_TENSORFLOW_SERVING = {"label"}
SUBJECTS = ("user_id", "history", "comm_seq")


def write_id(value: int | str) -> pb.Id:
    return pb.Id(text=value) if isinstance(value, str) else pb.Id(number=value)


def request_as_proto(name: str) -> pb.RetrieveRequest:
    value = REQUEST[name]
    message = pb.RetrieveRequest()
    match name:
        case "user_id":
            message.user_id.CopyFrom(write_id(value))
        case "history":
            message.history.ids.extend(map(write_id, value))
        case "comm_seq":
            message.comm_seq.values.extend(value.tolist())
        case "include_ids" | "exclude_ids":
            getattr(message, name).extend(map(write_id, value))
        case "params":
            message.params.CopyFrom(pb.SearchParams(**PARAMS))
        case "filter":
            for key, element in value.items():
                native_proto.write_value(element, message.filter.entries[key])
        case _:
            setattr(message, name, value)
    return message


def request_as_json(name: str) -> dict[str, Any]:
    value = REQUEST[name]
    if name == "comm_seq":
        value = value.reshape(2, 2).tolist()
    if name == "params":
        value = {**PARAMS, "level_topn": list(PARAMS["level_topn"])}
    return {name: value}


def test_fixtures_cover_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(RetrieveRequest)}
    assert REQUEST.keys() == fields - ONLY_IN_TENSORFLOW_SERVING
    assert PARAMS.keys() == {field.name for field in dataclasses.fields(ParamOverrides)}
    assert REQUEST.keys() == set(rest_json.RetrieveBody.model_fields)
    assert PARAMS.keys() == set(rest_json.ParamsBody.model_fields)
    assert REQUEST.keys() == set(pb.RetrieveRequest.DESCRIPTOR.fields_by_name)
    assert PARAMS.keys() == set(pb.SearchParams.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("name", REQUEST)
def test_request_field_arrives(name: str) -> None:
    (from_json,), is_batch = rest_json.requests_of_body(request_as_json(name))
    assert not is_batch
    from_proto = native_proto.request_of_proto(request_as_proto(name))
    for request in (from_json, from_proto):
        changed = {
            field.name
            for field in dataclasses.fields(RetrieveRequest)
            if not same(getattr(request, field.name), getattr(RetrieveRequest(), field.name))
        }
        assert changed == {name}
        assert same(getattr(request, name), REQUEST[name])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return list(left) == list(right)
    return bool(left == right and type(left) is type(right))


REPLY = RetrieveReply(
    hits=Hits(
        item_ids=[5, "x"],
        scores=[1.5, -2.0],
        n_scored=100,
        steps=4,
        notes=(),
        attributes=[{"title": "five", "year": 1999}, {}],
        explain={"policy": "level"},
    ),
    model="nann",
    version=3,
    timings_ms={"queue": 0.5},
    notes=(Note("unknown_history_items", "skipped", 2),),
    explain={"batch_size": 7},
)
# Where each field of the reply's values comes out: a path in the JSON body and in the message.
REPLY_PATHS = {
    "RetrieveReply.hits": "items",
    "RetrieveReply.model": "model",
    "RetrieveReply.version": "version",
    "RetrieveReply.timings_ms": "timings_ms",
    "RetrieveReply.notes": "notes",
    "RetrieveReply.explain": "explain",
    "Hits.item_ids": "items.item_id",
    "Hits.scores": "items.score",
    "Hits.n_scored": "n_scored",
    "Hits.steps": "explain.steps",
    "Hits.notes": "notes",  # part of RetrieveReply.notes, by its definition
    "Hits.attributes": "items.attributes",
    "Hits.explain": "explain",
    "Note.code": "notes.code",
    "Note.message": "notes.message",
    "Note.count": "notes.count",
}


def test_every_reply_field_comes_out() -> None:
    names = {
        f"{cls.__name__}.{field.name}"
        for cls in (RetrieveReply, Hits, Note)
        for field in dataclasses.fields(cls)
    }
    assert names == REPLY_PATHS.keys()
    body = rest_json.body_of_reply(REPLY, explain=True)
    assert body == {
        "items": [
            {"item_id": 5, "score": 1.5, "attributes": {"title": "five", "year": 1999}},
            {"item_id": "x", "score": -2.0, "attributes": {}},
        ],
        "model": "nann",
        "version": 3,
        "n_scored": 100,
        "timings_ms": {"queue": 0.5},
        "notes": [{"code": "unknown_history_items", "message": "skipped", "count": 2}],
        "explain": {"steps": 4, "policy": "level", "batch_size": 7},
    }
    assert proto_as_json(native_proto.response_of_reply(REPLY, explain=True)) == body


def proto_as_json(message: pb.RetrieveResponse) -> dict[str, Any]:
    read = native_proto.value_of_proto
    return {
        "items": [
            {
                "item_id": native_proto.id_of_proto(item.item_id, "id"),
                "score": item.score,
                "attributes": {key: read(value, key) for key, value in item.attributes.items()},
            }
            for item in message.items
        ],
        "model": message.model,
        "version": message.version,
        "n_scored": message.n_scored,
        "timings_ms": dict(message.timings_ms),
        "notes": [{"code": n.code, "message": n.message, "count": n.count} for n in message.notes],
        "explain": {key: read(value, key) for key, value in message.explain.items()},
    }


def test_reply_documentation_has_the_same_fields() -> None:
    body = rest_json.body_of_reply(REPLY, explain=True)
    assert body.keys() == docs.RetrieveReplyBody.model_fields.keys()
    assert body["items"][0].keys() == docs.ItemReply.model_fields.keys()
    assert body["notes"][0].keys() == docs.NoteReply.model_fields.keys()
    assert set(body) == set(pb.RetrieveResponse.DESCRIPTOR.fields_by_name)


def test_nothing_that_was_not_asked_for_is_in_the_reply() -> None:
    plain = dataclasses.replace(REPLY, hits=dataclasses.replace(REPLY.hits, attributes=None))
    body = rest_json.body_of_reply(plain)
    assert "explain" not in body
    assert "attributes" not in body["items"][0]
    assert not native_proto.response_of_reply(plain).explain


def test_every_profile_field_comes_out() -> None:
    profile = UserProfile(42, (1, "a"), n_base=1, n_live=1)
    body = rest_json.body_of_user(profile)
    assert body == {"user_id": 42, "history": [1, "a"], "n_base": 1, "n_live": 1}
    assert body.keys() == {field.name for field in dataclasses.fields(UserProfile)}
    assert body.keys() == docs.UserReply.model_fields.keys()
    message = native_proto.user_response(profile)
    assert body.keys() == set(message.DESCRIPTOR.fields_by_name)
    assert native_proto.id_of_proto(message.user_id, "id") == 42
    assert native_proto.ids_of_proto(message.history, "history") == [1, "a"]
    assert (message.n_base, message.n_live) == (1, 1)
