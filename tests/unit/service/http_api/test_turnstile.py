"""Who is let in while the event loop reads a crowd of requests, none of which is in a queue yet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nann.engine.errors import Overloaded
from nann.service.http_api import turnstile as turnstile_module
from nann.service.http_api.call import error_response
from nann.service.http_api.turnstile import Turnstile
from nann.service.metrics import Metrics


class Service:
    """Has room for `room` queries that nobody has put in a queue."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int] = []
        self.unread_s: list[float] = []

    def refuse_unread(self, *, searches: bool, ahead: int, unread_s: float) -> None:
        assert searches
        self.asked.append(ahead)
        self.unread_s.append(unread_s)
        if ahead >= self.room:
            raise Overloaded("the queue is full", retry_after_s=2.2)


def statuses(turnstile: Turnstile, count: int, target: bytes = b"/retrieve") -> list[int | None]:
    refusals = [turnstile.refusal(b"POST", target, []) for _ in range(count)]
    return [None if refusal is None else refusal.status for refusal in refusals]


def turnstile_of(service: Any) -> Turnstile:
    return Turnstile(service, None, Metrics(), access_log=False)


async def test_those_let_in_count_until_their_tasks_have_run() -> None:
    service = Service(room=3)
    turnstile = turnstile_of(service)
    assert statuses(turnstile, 5) == [None, None, None, 429, 429]
    assert service.asked == [0, 1, 2, 3, 3]
    await asyncio.sleep(0)
    assert statuses(turnstile, 1) == [None]
    assert service.asked[-1] == 0


async def test_a_refusal_is_that_of_the_framework() -> None:
    refusal = turnstile_of(Service(room=0)).refusal(b"POST", b"/retrieve", [(b"x-request-id", b"r-1")])
    assert refusal is not None
    usual = error_response(Overloaded("the queue is full", retry_after_s=2.2), "r-1")
    assert sorted(refusal.headers) == sorted([*usual.raw_headers, (b"x-request-id", b"r-1")])
    assert (refusal.status, refusal.body) == (usual.status_code, usual.body)


async def test_other_routes_pass_and_do_not_count() -> None:
    service = Service(room=1)
    turnstile = turnstile_of(service)
    assert statuses(turnstile, 3, b"/healthz") == [None] * 3
    assert service.asked == []
    assert statuses(turnstile, 2) == [None, 429]


async def test_who_comes_has_waited_as_long_as_the_loop_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(turnstile_module.time, "perf_counter", lambda: now_s)
    service = Service(room=10)
    turnstile = turnstile_of(service)
    statuses(turnstile, 1)
    now_s = 0.75
    statuses(turnstile, 1)
    await asyncio.sleep(0)
    now_s = 5.0  # nothing came for a while
    statuses(turnstile, 2)
    await asyncio.sleep(0)
    statuses(turnstile, 1)
    assert service.unread_s == [0.0, 0.0, 0.75, 0.75, 0.0]
