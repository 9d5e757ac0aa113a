"""The two clients: what can be asked is in `operations`, when again in `retry`; here is the waiting."""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from nann_client import operations
from nann_client.errors import NannError
from nann_client.operations import Operation
from nann_client.retry import Plan, RetryBudget, RetryPolicy
from nann_client.transports import Server, async_transport, transport

__all__ = ["AsyncClient", "Client"]

# That of the server, for a query that brings none.
_TIMEOUT_S: Final = 10.0
_POLICY: Final = RetryPolicy()

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(build: Callable[P, Operation[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(build(*args, **kwargs))

    return method


def _awaiting(
    build: Callable[P, Operation[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @functools.wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(build(*args, **kwargs))

    return method


class _Calls:
    """What both clients keep: how long a call may take, and when one is tried again."""

    def __init__(self, timeout_s: float, retry: RetryPolicy) -> None:
        self.timeout_s = _positive(timeout_s)
        self._retry = retry
        self._budget = RetryBudget()

    def within(self, timeout_s: float) -> _Calls:
        other = copy.copy(self)
        other.timeout_s = _positive(timeout_s)
        return other

    def plan(self, operation: Operation[Any]) -> Plan:
        return Plan(operation, self.timeout_s, self._retry, self._budget)


def _positive(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, not {timeout_s}")
    return timeout_s


class Client:
    """A client that waits. Threads may share it; it keeps its connections between calls.

    `url` is ``http://HOST:8501``, ``grpc://HOST:8500``, or ``https`` and ``grpcs`` for TLS. A call takes
    no longer than `timeout_s`, tries and pauses together. `headers` go with every call; `ca_file` holds
    the certificates to trust in place of the system's; `client_cert` is the caller's own, with its key, for
    a server that asks for one.

    Every method raises `NannError`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        retry: RetryPolicy = _POLICY,
        headers: Mapping[str, str] | None = None,
        ca_file: str | Path | None = None,
        client_cert: tuple[str | Path, str | Path] | None = None,
    ) -> None:
        self._calls = _Calls(timeout_s, retry)
        self._transport = transport(Server(url, dict(headers or {}), ca_file, client_cert))

    retrieve = _blocking(operations.retrieve)
    retrieve_many = _blocking(operations.retrieve_many)
    record_events = _blocking(operations.record_events)
    user = _blocking(operations.user)
    delete_user = _blocking(operations.delete_user)
    model_status = _blocking(operations.model_status)

    def within(self, timeout_s: float) -> Client:
        """This client, with another time for its calls; both have the same connections."""
        other = copy.copy(self)
        other._calls = self._calls.within(timeout_s)
        return other

    def run(self, operation: Operation[T]) -> T:
        """Carry out an operation of `nann_client.operations`."""
        plan = self._calls.plan(operation)
        while True:
            try:
                result: T = self._transport.send(operation, plan.begin())
            except NannError as error:
                pause_s = plan.pause_s(error)
                if pause_s is None:
                    raise
                time.sleep(pause_s)
            else:
                plan.succeeded()
                return result

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """A client for an event loop, whose tasks may share it; otherwise as `Client`."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        retry: RetryPolicy = _POLICY,
        headers: Mapping[str, str] | None = None,
        ca_file: str | Path | None = None,
        client_cert: tuple[str | Path, str | Path] | None = None,
    ) -> None:
        self._calls = _Calls(timeout_s, retry)
        self._transport = async_transport(Server(url, dict(headers or {}), ca_file, client_cert))

    retrieve = _awaiting(operations.retrieve)
    retrieve_many = _awaiting(operations.retrieve_many)
    record_events = _awaiting(operations.record_events)
    user = _awaiting(operations.user)
    delete_user = _awaiting(operations.delete_user)
    model_status = _awaiting(operations.model_status)

    def within(self, timeout_s: float) -> AsyncClient:
        """This client, with another time for its calls; both have the same connections."""
        other = copy.copy(self)
        other._calls = self._calls.within(timeout_s)
        return other

    async def run(self, operation: Operation[T]) -> T:
        """Carry out an operation of `nann_client.operations`."""
        plan = self._calls.plan(operation)
        while True:
            try:
                result: T = await self._transport.send(operation, plan.begin())
            except NannError as error:
                pause_s = plan.pause_s(error)
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            else:
                plan.succeeded()
                return result

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
