"""Requests as bytes and answers as bytes, over either transport: the least that a generator can do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc

from nann.cli.benchmark_http import HttpClient
from nann.offline.benchmark.load import Outcome
from nann.offline.benchmark.users import User
from nann.service.pb import retrieval_pb2 as pb

__all__ = [
    "BATCH_RETRIEVE",
    "RETRIEVE",
    "Exchange",
    "RawTarget",
    "batch_failures",
    "batch_message",
    "grpc_exchange",
    "query_fields",
    "query_message",
    "rest_exchange",
]

RETRIEVE = "/nann.retrieval.v1.RetrievalService/Retrieve"
BATCH_RETRIEVE = "/nann.retrieval.v1.RetrievalService/BatchRetrieve"
_MAX_MESSAGE_BYTES = 64 << 20


class Exchange(Protocol):
    """Sends a request's bytes and returns the answer's."""

    async def __call__(self, request: bytes) -> bytes: ...


def query_fields(user: User, k: int) -> dict[str, Any]:
    """The body of POST /retrieve for one user's history."""
    return {"history": user.history, "k": k, "with_attributes": False}


def query_message(fields: Mapping[str, Any]) -> Any:
    """The same as a message."""
    message = pb.RetrieveRequest(k=fields["k"], with_attributes=fields["with_attributes"])
    for item_id in fields["history"]:
        if isinstance(item_id, str):
            message.history.ids.add(text=item_id)
        else:
            message.history.ids.add(number=item_id)
    return message


def batch_message(queries: Sequence[Mapping[str, Any]]) -> Any:
    """Several queries in one call."""
    return pb.BatchRetrieveRequest(queries=[query_message(fields) for fields in queries])


@asynccontextmanager
async def rest_exchange(url: str, path: str = "/retrieve", *, timeout_s: float) -> AsyncIterator[Exchange]:
    """POST to a path; RuntimeError for any status but 200."""
    client = HttpClient(url, timeout_s=timeout_s)

    async def exchange(request: bytes) -> bytes:
        status, content = await client.post(path, request)
        if status != 200:
            raise RuntimeError(f"HTTP {status}: {content[:300]!r}")
        return content

    try:
        yield exchange
    finally:
        await client.close()


@asynccontextmanager
async def grpc_exchange(url: str, method: str = RETRIEVE, *, timeout_s: float) -> AsyncIterator[Exchange]:
    """Call a unary method of a server at ``grpc://host:port``; AioRpcError for any status but OK."""
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(urlsplit(url).netloc, options=options) as channel:
        call = channel.unary_unary(method)

        async def exchange(request: bytes) -> bytes:
            answer: bytes = await call(request, timeout=timeout_s)
            return answer

        yield exchange


def batch_failures(answer: bytes) -> int:
    """How many queries of a batch call have an error in place of an answer."""
    return sum(one.HasField("error") for one in pb.BatchRetrieveResponse.FromString(answer).results)


class RawTarget:
    """A target whose answers nobody reads but to see that they are some; a failure ends the measurement.

    `failures` counts, in an answer, the queries that have none.
    """

    def __init__(
        self,
        exchange: Exchange,
        requests: Sequence[bytes],
        failures: Callable[[bytes], int] = lambda _answer: 0,
    ) -> None:
        self._exchange = exchange
        self._requests = requests
        self._failures = failures

    async def send(self, i: int) -> Outcome:
        n = self._failures(await self._exchange(self._requests[i % len(self._requests)]))
        if n:
            raise RuntimeError(f"{n} queries of a batch were refused or failed")
        return Outcome()
