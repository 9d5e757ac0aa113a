"""Ask a running server over REST or gRPC; the answer has one form, that of POST /retrieve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nann.cli.credentials import NO_CREDENTIALS, Credentials

if TYPE_CHECKING:
    import httpx

__all__ = ["AskError", "ask", "ask_grpc", "ask_rest", "parse_id"]

Body = Mapping[str, Any]


class AskError(Exception):
    """The server could not be reached, or refused; the message says which and why."""


def parse_id(text: str, *, as_text: bool = False) -> int | str:
    """An id as the data has it: digits are an integer unless `as_text`."""
    digits = text[1:] if text.startswith("-") else text
    return int(text) if digits.isdecimal() and not as_text else text


def ask(
    url: str, body: Body, *, credentials: Credentials = NO_CREDENTIALS, timeout_s: float = 30.0
) -> dict[str, Any]:
    """Send one retrieval to ``http(s)://host:port`` or ``grpc(s)://host:port``.

    `body` has the fields of POST /retrieve: a subject, k, profile, params model, explain, with_attributes.

    Raises:
        AskError: no server answers there, or it refuses the query.
        ValueError: the address is of another kind.
    """
    import httpx

    parts = urlsplit(url)
    if parts.scheme in ("grpc", "grpcs") and parts.netloc:
        return ask_grpc(url, body, credentials=credentials, timeout_s=timeout_s)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--url should be http(s)://HOST:PORT or grpc(s)://HOST:PORT, not {url!r}")
    tls = credentials.tls() if parts.scheme == "https" else True
    with httpx.Client(base_url=url, timeout=timeout_s, headers=credentials.headers, verify=tls) as client:
        return ask_rest(client, body)


def ask_rest(client: httpx.Client, body: Body) -> dict[str, Any]:
    """Send one retrieval over an open connection."""
    import httpx

    try:
        response = client.post("/retrieve", json=dict(body))
    except httpx.HTTPError as error:
        raise AskError(f"no answer from {client.base_url} ({error}); start one with: nann serve") from error
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise AskError(f"{client.base_url} answered {response.status_code} without a JSON object")
    if response.is_error:
        reason = answer.get("error", {})
        raise AskError(f"{reason.get('code', response.status_code)}: {reason.get('message', response.text)}")
    return answer


def ask_grpc(
    url: str, body: Body, *, credentials: Credentials = NO_CREDENTIALS, timeout_s: float = 30.0
) -> dict[str, Any]:
    """Send one retrieval over a new channel to ``grpc(s)://host:port``."""
    import grpc

    from nann.service.pb import retrieval_pb2_grpc
    from nann.service.wire.native_proto import id_of_proto, value_of_proto

    with credentials.channel(grpc, url) as channel:
        stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            reply = stub.Retrieve(
                _request(body), timeout=timeout_s, metadata=tuple(credentials.headers.items())
            )
        except grpc.RpcError as error:
            raise AskError(
                f"{error.code().name.lower()}: {error.details()} (gRPC, {urlsplit(url).netloc})"
            ) from error
    return {
        "items": [
            {
                "item_id": id_of_proto(hit.item_id, "item_id"),
                "score": hit.score,
                "attributes": {name: value_of_proto(value, name) for name, value in hit.attributes.items()},
            }
            for hit in reply.items
        ],
        "model": reply.model,
        "version": reply.version,
        "n_scored": reply.n_scored,
        "timings_ms": dict(reply.timings_ms),
        "notes": [{"code": note.code, "message": note.message, "count": note.count} for note in reply.notes],
        **(
            {"explain": {name: value_of_proto(value, name) for name, value in reply.explain.items()}}
            if reply.explain
            else {}
        ),
    }


def _request(body: Body) -> Any:
    from nann.service.pb import retrieval_pb2 as pb

    def id_of(value: int | str) -> Any:
        return pb.Id(text=value) if isinstance(value, str) else pb.Id(number=value)

    fields = dict(body)
    if "user_id" in fields:
        fields["user_id"] = id_of(fields["user_id"])
    if "history" in fields:
        fields["history"] = pb.IdList(ids=[id_of(item) for item in fields["history"]])
    if "params" in fields:
        fields["params"] = pb.SearchParams(**fields["params"])
    return pb.RetrieveRequest(**fields)
