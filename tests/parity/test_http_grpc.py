"""One question over REST and over gRPC has one answer, and one error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine
from transports import Transports

from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import native_proto

CASES: list[dict[str, Any]] = [
    {"user_id": 1},
    {"user_id": 2, "k": 5, "exclude_seen": False},
    {"user_id": "nobody"},
    {"user_id": 2**62},
    {"history": [0, 1, 99999], "k": 7, "explain": True},
    {"history": [0, 1, 99999], "strict": True},
    {"history": [], "k": 3},
    {"history": [5], "k": 0},
    {"history": [5], "k": 5000},
    {"history": [5], "include_ids": [3, 4, 5], "exclude_ids": [4], "with_attributes": True},
    {"history": [5], "profile": "fast"},
    {"history": [5], "profile": "unheard-of"},
    {"history": [5], "params": {"policy": "exhaustive"}, "k": 2, "explain": True},
    {"history": [5], "params": {"policy": "level"}},
    {"history": [5], "params": {"level_topn": [9, 9, 9, 9, 9, 4]}},
    {"history": [5], "params": {"level_topn": [9, 9, 9, 9, 9, 4]}, "k": 5},
    {"history": [5], "params": {"ef": 0}},
    {"history": [5], "params": {"beam_width": 3, "max_steps": 2, "ef": 9}},
    {"history": [5], "model": "other"},
    {"history": [5], "model": "nann", "version": 1},
    {"history": [5], "version": 2},
    {"history": [5], "timeout_ms": -1},
    {"comm_seq": [[0.25] * 64] * 50, "k": 4},
    {"comm_seq": [[0.25] * 64] * 3},
    {},
]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    async with Transports(tmp_path, FakeEngine()).open() as opened:
        yield opened


def as_proto(body: dict[str, Any]) -> pb.RetrieveRequest:
    def write_id(value: int | str) -> pb.Id:
        return pb.Id(text=value) if isinstance(value, str) else pb.Id(number=value)

    fields: dict[str, Any] = {}
    for name, value in body.items():
        match name:
            case "user_id":
                fields[name] = write_id(value)
            case "history":
                fields[name] = pb.IdList(ids=map(write_id, value))
            case "comm_seq":
                fields[name] = pb.EmbeddedHistory(values=[number for row in value for number in row])
            case "include_ids" | "exclude_ids":
                fields[name] = list(map(write_id, value))
            case "params":
                fields[name] = pb.SearchParams(**value)
            case _:
                fields[name] = value
    return pb.RetrieveRequest(**fields)


def as_body(message: pb.RetrieveResponse) -> dict[str, Any]:
    """What REST would say, without the times."""

    def values(entries: Any) -> dict[str, Any]:
        return {key: native_proto.value_of_proto(value, key) for key, value in entries.items()}

    body: dict[str, Any] = {
        "items": [
            {"item_id": native_proto.id_of_proto(hit.item_id, "item_id"), "score": hit.score}
            | ({"attributes": values(hit.attributes)} if hit.attributes else {})
            for hit in message.items
        ],
        "model": message.model,
        "version": message.version,
        "n_scored": message.n_scored,
        "notes": [
            {"code": note.code, "message": note.message, "count": note.count} for note in message.notes
        ],
    }
    return body | ({"explain": values(message.explain)} if message.explain else {})


@pytest.mark.parametrize("body", CASES, ids=str)
async def test_one_answer(world: Transports, body: dict[str, Any]) -> None:
    rest = (await world.http.post("/retrieve", json=body)).json()
    rest.pop("timings_ms", None)
    try:
        over_grpc = as_body(await world.native.Retrieve(as_proto(body)))
    except grpc.aio.AioRpcError as error:
        assert error.details() == rest["error"]["message"]
    else:
        assert over_grpc == rest


async def test_one_batch_answer_with_the_same_error_codes(world: Transports) -> None:
    rest = (await world.http.post("/retrieve", json={"queries": CASES})).json()["results"]
    queries = [as_proto(body) for body in CASES]
    over_grpc = (await world.native.BatchRetrieve(pb.BatchRetrieveRequest(queries=queries))).results
    n_errors = 0
    for left, right in zip(rest, over_grpc, strict=True):
        left.pop("timings_ms", None)
        if right.WhichOneof("outcome") == "error":
            n_errors += 1
            assert (left["error"]["code"], left["error"]["message"]) == (
                right.error.code,
                right.error.message,
            )
        else:
            assert as_body(right.response) == left
    assert 5 < n_errors < len(CASES)
