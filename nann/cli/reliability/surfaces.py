"""One query on every surface that can say it: an embedded history, NANN's widths, nothing excluded.

Histories are float16, whose values JSON, protobuf's floats and DT_HALF all carry exactly.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from nann.cli.reliability.raw import BATCH_RETRIEVE, RETRIEVE, Exchange, grpc_exchange, rest_exchange
from nann.engine.types import ItemId
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.native_proto import id_of_proto
from nann.service.wire.tensors import decode_tensor, encode_tensor

if TYPE_CHECKING:
    from jaxtyping import Float16

__all__ = ["Answer", "Surface", "open_surfaces"]

_PREDICT = "/tensorflow.serving.PredictionService/Predict"


@dataclass(frozen=True, slots=True)
class Answer:
    """Item ids, best first, and their scores: float32 values, as doubles where a surface has doubles."""

    ids: tuple[ItemId, ...]
    scores: tuple[float, ...]

    def same_scores(self, other: Answer) -> bool:
        """Whether the scores are equal bit for bit."""
        return np.array(self.scores).tobytes() == np.array(other.scores).tobytes()


class Surface(Protocol):
    """Asks for a batch of embedded histories in one call; one answer a history, in their order.

    Raises RuntimeError or AioRpcError when the call, or a query of it, is refused or fails.
    """

    async def __call__(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]: ...


@asynccontextmanager
async def open_surfaces(
    rest_url: str, grpc_url: str, model: str, level_topn: Sequence[int], *, timeout_s: float
) -> AsyncIterator[dict[str, Surface]]:
    """The surfaces of a server by name; REST and gRPC each as a call for one query and one for several."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rest = await enter(rest_exchange(rest_url, timeout_s=timeout_s))
        predict_rest = await enter(
            rest_exchange(rest_url, f"/v1/models/{model}:predict", timeout_s=timeout_s)
        )
        retrieve, batch_retrieve, predict = [
            await enter(grpc_exchange(grpc_url, method, timeout_s=timeout_s))
            for method in (RETRIEVE, BATCH_RETRIEVE, _PREDICT)
        ]
        native = _Native(rest, retrieve, batch_retrieve, model, list(level_topn), timeout_s)
        tensors = _Tensors(predict_rest, predict, model, list(level_topn))
        yield {
            "REST": native.rest,
            "REST queries": native.rest_queries,
            "gRPC Retrieve": native.grpc,
            "gRPC BatchRetrieve": native.grpc_queries,
            ":predict inputs": tensors.columns,
            ":predict instances": tensors.rows,
            "Predict": tensors.predict,
        }


@dataclass(frozen=True, slots=True)
class _Native:
    """The API of its own, over both transports."""

    exchange: Exchange
    retrieve: Exchange
    batch_retrieve: Exchange
    model: str
    level_topn: list[int]
    timeout_s: float

    async def rest(self, batch: Float16[np.ndarray, "1 length D"]) -> list[Answer]:
        return [_of_json(orjson.loads(await self.exchange(_json(self._fields(batch[0])))))]

    async def rest_queries(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]:
        sent = _json({"queries": [self._fields(history) for history in batch]})
        return [_of_json(result) for result in orjson.loads(await self.exchange(sent))["results"]]

    async def grpc(self, batch: Float16[np.ndarray, "1 length D"]) -> list[Answer]:
        content = await self.retrieve(self._message(batch[0]).SerializeToString())
        return [_of_proto(pb.RetrieveResponse.FromString(content))]

    async def grpc_queries(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]:
        request = pb.BatchRetrieveRequest(queries=[self._message(history) for history in batch])
        content = await self.batch_retrieve(request.SerializeToString())
        answers = []
        for result in pb.BatchRetrieveResponse.FromString(content).results:
            if result.WhichOneof("outcome") != "response":
                raise RuntimeError(f"a query of the batch failed: {result.error}")
            answers.append(_of_proto(result.response))
        return answers

    def _fields(self, history: Float16[np.ndarray, "length D"]) -> dict[str, Any]:
        return {
            "comm_seq": history.astype(np.float64),
            "model": self.model,
            "params": {"level_topn": self.level_topn},
            "exclude_seen": False,
            "with_attributes": False,
            "timeout_ms": 1e3 * self.timeout_s,
        }

    def _message(self, history: Float16[np.ndarray, "length D"]) -> Any:
        return pb.RetrieveRequest(
            comm_seq=pb.EmbeddedHistory(values=history.reshape(-1).tolist()),
            model=self.model,
            params=pb.SearchParams(level_topn=self.level_topn),
            exclude_seen=False,
            with_attributes=False,
        )


@dataclass(frozen=True, slots=True)
class _Tensors:
    """TensorFlow Serving's API with the signature that gives scores too, over both transports."""

    exchange: Exchange
    call: Exchange
    model: str
    level_topn: list[int]

    async def columns(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]:
        inputs = {"comm_seq": _flat(batch).astype(np.float64), "level_topn": self.level_topn}
        outputs = (await self._ask({"inputs": inputs}))["outputs"]
        return _of_tables(outputs["top_k"], outputs["scores"])

    async def rows(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]:
        flat = _flat(batch).astype(np.float64)
        body = {"instances": [{"comm_seq": row, "level_topn": self.level_topn} for row in flat]}
        predictions = (await self._ask(body))["predictions"]
        return _of_tables([row["top_k"] for row in predictions], [row["scores"] for row in predictions])

    async def predict(self, batch: Float16[np.ndarray, "batch length D"]) -> list[Answer]:
        request = tf_messages.PredictRequest()
        request.model_spec.name = self.model
        request.model_spec.signature_name = "retrieve"
        encode_tensor(_flat(batch), request.inputs["comm_seq"])
        encode_tensor(np.array(self.level_topn, np.int32), request.inputs["level_topn"])
        outputs = tf_messages.PredictResponse.FromString(await self.call(request.SerializeToString())).outputs
        ids, scores = (decode_tensor(outputs[name], name).tolist() for name in ("top_k", "scores"))
        named = [[one.decode() if isinstance(one, bytes) else one for one in row] for row in ids]
        return _of_tables(named, scores)

    async def _ask(self, body: Mapping[str, Any]) -> Any:
        # Not orjson: a row that is short of the others is filled up with -Infinity.
        return json.loads(await self.exchange(_json({"signature_name": "retrieve", **body})))


def _flat(batch: Float16[np.ndarray, "batch length D"]) -> Float16[np.ndarray, "batch width"]:
    return batch.reshape(len(batch), -1)


def _json(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _of_json(result: Mapping[str, Any]) -> Answer:
    if "error" in result:
        raise RuntimeError(f"a query of the batch failed: {result['error']}")
    items = result["items"]
    return Answer(tuple(item["item_id"] for item in items), tuple(item["score"] for item in items))


def _of_proto(response: Any) -> Answer:
    return Answer(
        tuple(id_of_proto(item.item_id, "item_id") for item in response.items),
        tuple(item.score for item in response.items),
    )


def _of_tables(ids: Sequence[Sequence[ItemId]], scores: Sequence[Sequence[float]]) -> list[Answer]:
    """The rows of `top_k` and `scores`, without what fills up a row that is short of the others."""
    answers = []
    for row_ids, row_scores in zip(ids, scores, strict=True):
        kept = [pair for pair in zip(row_ids, row_scores, strict=True) if pair[1] != -np.inf]
        answers.append(Answer(tuple(one for one, _ in kept), tuple(score for _, score in kept)))
    return answers
