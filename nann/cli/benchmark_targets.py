"""Servers that a benchmark can put its load on: by REST, by gRPC, or by TF Serving's Predict."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from nann.cli.benchmark_http import HttpClient
from nann.cli.credentials import NO_CREDENTIALS, Credentials
from nann.offline.benchmark.load import Outcome, Target
from nann.offline.benchmark.users import User

__all__ = ["Ask", "grpc_target", "predict_target", "rest_target"]

_RETRIEVE = "/nann.retrieval.v1.RetrievalService/Retrieve"
_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_PLAIN_FIELDS = ("k", "model", "profile", "exclude_seen", "with_attributes")
_MAX_MESSAGE_BYTES = 64 << 20  # answers of any k the server allows


@dataclass(frozen=True, slots=True)
class Ask:
    """What every request asks for; None leaves it to the server. `params` override `profile`."""

    k: int | None = None
    model: str | None = None
    profile: str | None = None
    params: Mapping[str, Any] | None = None
    exclude_seen: bool | None = None
    by_user_id: bool = False
    with_attributes: bool = False

    def body(self, user: User) -> dict[str, Any]:
        """POST /retrieve's body for one user; ValueError when the user lacks what it needs."""
        body: dict[str, Any] = {
            "k": self.k,
            "model": self.model,
            "profile": self.profile,
            "params": dict(self.params) if self.params else None,
            "exclude_seen": self.exclude_seen,
            "with_attributes": self.with_attributes,
        }
        by_user_id = self.by_user_id or user.history is None
        subject = "user_id" if by_user_id else "history"
        body[subject] = user.user_id if by_user_id else user.history
        if body[subject] is None:
            raise ValueError("a user of the workload has no user_id to ask by")
        return {name: value for name, value in body.items() if value is not None}


class _Send(Protocol):
    async def __call__(self, request: bytes, *, timeout: float) -> Any: ...


# REST


class _RestTarget:
    def __init__(self, client: HttpClient, bodies: Sequence[bytes]) -> None:
        self._client = client
        self._bodies = bodies

    async def send(self, i: int) -> Outcome:
        try:
            status, content = await self._client.post("/retrieve", self._bodies[i % len(self._bodies)])
        except (TimeoutError, OSError, ValueError) as error:
            return Outcome(_transport_code(error))
        if status != 200:
            return Outcome(_error_code(status, content))
        answer = orjson.loads(content)
        return _told(answer["timings_ms"], answer["n_scored"])


@asynccontextmanager
async def rest_target(
    url: str, ask: Ask, users: Sequence[User], *, timeout_s: float, credentials: Credentials = NO_CREDENTIALS
) -> AsyncIterator[Target]:
    """POST /retrieve of the server at ``http(s)://host:port``, on kept-alive connections."""
    tls = credentials.tls() if url.startswith("https://") else None
    client = HttpClient(url, timeout_s=timeout_s, headers=credentials.headers, tls=tls)
    try:
        yield _RestTarget(client, [orjson.dumps(ask.body(user)) for user in users])
    finally:
        await client.close()


def _transport_code(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "client_timeout"
    return "connection_failed" if isinstance(error, OSError) else "not_http"


def _error_code(status: int, content: bytes) -> str:
    try:
        return str(orjson.loads(content)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"http_{status}"


def _told(timings_ms: Mapping[str, float], n_scored: int) -> Outcome:
    """From the reply's own account. A popular fallback has no time on a lane."""
    search_ms, queue_ms = timings_ms.get("search"), timings_ms.get("queue")
    return Outcome(
        service_s=None if search_ms is None else search_ms / 1e3,
        queue_s=None if queue_ms is None else queue_ms / 1e3,
        n_scored=n_scored,
    )


# gRPC


class _GrpcTarget:
    def __init__(self, call: _Send, requests: Sequence[bytes], timeout_s: float, *, tells: bool) -> None:
        self._call = call
        self._requests = requests
        self._timeout_s = timeout_s
        self._tells = tells

    async def send(self, i: int) -> Outcome:
        import grpc

        try:
            reply = await self._call(self._requests[i % len(self._requests)], timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            if _REFUSED_STREAM in (error.details() or ""):
                return Outcome("refused_stream")
            return Outcome(error.code().name.lower())
        return _told(reply.timings_ms, reply.n_scored) if self._tells else Outcome()


# How gRPC words a call that the server's HTTP/2 refused because too many are open on the connection
# (RFC 9113, REFUSED_STREAM): it was never processed, and may be sent again.
_REFUSED_STREAM = "RST_STREAM with error code 7"


@asynccontextmanager
async def grpc_target(
    url: str, ask: Ask, users: Sequence[User], *, timeout_s: float, credentials: Credentials = NO_CREDENTIALS
) -> AsyncIterator[Target]:
    """nann.retrieval.v1's Retrieve of the server at ``grpc(s)://host:port``."""
    from nann.service.pb import retrieval_pb2 as pb

    requests = [_retrieve_message(pb, ask.body(user)).SerializeToString() for user in users]
    async with _unary(url, _RETRIEVE, pb.RetrieveResponse.FromString, credentials) as call:
        yield _GrpcTarget(call, requests, timeout_s, tells=True)


@asynccontextmanager
async def predict_target(
    url: str,
    ask: Ask,
    *,
    comm_seq_width: int,
    requests: int,
    seed: int,
    timeout_s: float,
    credentials: Credentials = NO_CREDENTIALS,
) -> AsyncIterator[Target]:
    """TF Serving's Predict, as NANN's client calls it, at ``grpc(s)://host:port``.

    No artifact holds embedded histories, so ``comm_seq`` is seeded noise of the embeddings' initial scale
    (reference/nann.md, "Model"): the walk then starts from popular items and tells nothing of quality.
    """
    from nann.service.wire.tensors import encode_tensor
    from nann.service.wire.tf_messages import PredictRequest, PredictResponse

    level_topn = (ask.params or {}).get("level_topn")
    if level_topn is None:
        raise ValueError("Predict needs --level-topn t0,t1,t2,t3,t4,t5")
    rng = np.random.default_rng(seed)
    messages = []
    for _ in range(requests):
        message = PredictRequest()
        message.model_spec.name = ask.model or "nann"
        message.model_spec.signature_name = "serving_default"
        comm_seq = rng.normal(0.0, 32**-0.5, (1, comm_seq_width)).astype(np.float16)
        encode_tensor(comm_seq, message.inputs["comm_seq"])
        encode_tensor(np.asarray(level_topn, dtype=np.int32), message.inputs["level_topn"])
        messages.append(message.SerializeToString())
    async with _unary(url, _PREDICT, PredictResponse.FromString, credentials) as call:
        yield _GrpcTarget(call, messages, timeout_s, tells=False)


@asynccontextmanager
async def _unary(url: str, method: str, decode: Any, credentials: Credentials) -> AsyncIterator[_Send]:
    """A call of one method whose requests are encoded beforehand, so that encoding is not measured."""
    import grpc

    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
    async with credentials.channel(grpc.aio, url, options) as channel:
        call = channel.unary_unary(method, request_serializer=None, response_deserializer=decode)
        yield functools.partial(call, metadata=tuple(credentials.headers.items()))


def _retrieve_message(pb: Any, body: Mapping[str, Any]) -> Any:
    message = pb.RetrieveRequest(**{name: body[name] for name in _PLAIN_FIELDS if name in body})
    if "params" in body:
        message.params.CopyFrom(pb.SearchParams(**body["params"]))
    if "user_id" in body:
        message.user_id.CopyFrom(_id(pb, body["user_id"]))
    else:
        message.history.ids.extend(_id(pb, item_id) for item_id in body["history"])
    return message


def _id(pb: Any, value: int | str) -> Any:
    return pb.Id(text=value) if isinstance(value, str) else pb.Id(number=value)
