"""One query over every surface, alone and in batches of every size: the same ids and the same scores."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from golden import GOLDEN, load_engine
from transports import Transports

from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor

N_QUERIES = 24
LEVEL_TOPN = [16, 24, 24, 24, 24, 10]

Answer = list[tuple[int, float]]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    shutil.copytree(GOLDEN / "artifact", tmp_path / "nann" / "2")
    served = Transports(tmp_path, FakeEngine(), load_engine=lambda path: load_engine(path, max_batch=4))
    async with served.open() as opened:
        yield opened


def answers_of(table: dict[str, Any]) -> list[Answer]:
    return [
        [(item, score) for item, score in zip(ids, scores, strict=True) if item != -1]
        for ids, scores in zip(table["top_k"], table["scores"], strict=True)
    ]


@pytest.mark.slow
async def test_every_surface_gives_one_answer(world: Transports) -> None:
    shape = world.service.metadata()
    rng = np.random.default_rng(7)
    # Whole numbers, which the golden model scores exactly in every shape, so that nothing but the way of a
    # query can make a difference.
    size = (N_QUERIES, shape.history_length, shape.input_dim)
    histories = rng.integers(-3, 4, size).astype(np.float16)

    def native(history: Any) -> dict[str, Any]:
        return {
            "comm_seq": history.astype(float).tolist(),
            "params": {"level_topn": LEVEL_TOPN},
            "exclude_seen": False,
            "with_attributes": False,
        }

    def message(history: Any) -> pb.RetrieveRequest:
        return pb.RetrieveRequest(
            comm_seq=pb.EmbeddedHistory(values=history.reshape(-1).astype(float).tolist()),
            params=pb.SearchParams(level_topn=LEVEL_TOPN),
            exclude_seen=False,
        )

    async def rest(batch: Any) -> list[Answer]:
        body = {"queries": [native(history) for history in batch]} if len(batch) > 1 else native(batch[0])
        reply = (await world.http.post("/retrieve", json=body)).raise_for_status().json()
        results = reply["results"] if len(batch) > 1 else [reply]
        return [[(item["item_id"], item["score"]) for item in result["items"]] for result in results]

    async def grpc(batch: Any) -> list[Answer]:
        if len(batch) == 1:
            replies = [await world.native.Retrieve(message(batch[0]))]
        else:
            queries = [message(history) for history in batch]
            results = (await world.native.BatchRetrieve(pb.BatchRetrieveRequest(queries=queries))).results
            replies = [result.response for result in results]
        return [[(item.item_id.number, item.score) for item in reply.items] for reply in replies]

    async def rest_predict(batch: Any) -> list[Answer]:
        flat = batch.reshape(len(batch), -1).astype(float).tolist()
        body = {"signature_name": "retrieve", "inputs": {"comm_seq": flat, "level_topn": LEVEL_TOPN}}
        response = (await world.http.post("/v1/models/nann:predict", json=body)).raise_for_status()
        columns = answers_of(json.loads(response.content)["outputs"])
        rows = [{"comm_seq": row, "level_topn": LEVEL_TOPN} for row in flat]
        body = {"signature_name": "retrieve", "instances": rows}
        response = (await world.http.post("/v1/models/nann:predict", json=body)).raise_for_status()
        predictions = json.loads(response.content)["predictions"]
        assert columns == answers_of({key: [row[key] for row in predictions] for key in predictions[0]})
        return columns

    async def predict(batch: Any) -> list[Answer]:
        request = tf_messages.PredictRequest()
        request.model_spec.name = "nann"
        request.model_spec.signature_name = "retrieve"
        encode_tensor(batch.reshape(len(batch), -1), request.inputs["comm_seq"])
        encode_tensor(np.array(LEVEL_TOPN, np.int32), request.inputs["level_topn"])
        reply = await world.predict(request)
        return answers_of(
            {name: decode_tensor(value, name).tolist() for name, value in reply.outputs.items()}
        )

    expected = [answer for history in histories for answer in await rest(history[None])]
    assert all(len(answer) == LEVEL_TOPN[-1] for answer in expected)
    for ask in (rest, grpc, rest_predict, predict):
        for size in (1, 2, 3, 4, 5, N_QUERIES):
            batches = [histories[start : start + size] for start in range(0, N_QUERIES, size)]
            answers = [one for batch in await asyncio.gather(*map(ask, batches)) for one in batch]
            assert answers == expected, (ask.__name__, size)
