"""Overload of a server whose searches sleep: what is counted, and the arithmetic of the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nann.cli.reliability.free_engine import free_server
from nann.cli.reliability.overload import Offer, OverloadResult, offer_overload, recovery_s
from nann.offline.benchmark.load import OK, Outcome, Sample
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.users import User
from nann.offline.progress import Progress

_USERS = [User(user_id=n, history=[n + 1, n + 2]) for n in range(5)]


@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_every_request_of_an_overload_is_an_answer_or_a_refusal(tmp_path: Path, transport: str) -> None:
    offer = Offer(
        factor=3.0,
        deadline_ms=300.0,
        transport="rest" if transport == "rest" else "grpc",
        duration_s=0.5,
        warm_up_s=0.5,
        capacity_s=0.5,
        calm_s=0.5,
    )
    with free_server(tmp_path, search_s=0.1, queue_limit=64, max_queries_per_call=1) as server:
        result = await offer_overload(server, _USERS, offer, seed=1, progress=Progress(silent=True))
    assert set(result.codes) <= {OK, "overloaded", "resource_exhausted", "deadline_exceeded"}
    assert result.refusals is not None
    assert result.goodput_qps > 0
    assert "refusals p50" in result.words()


def _samples(latencies_s: list[float], *, start_s: float = 100.0, code: str = OK) -> list[Sample]:
    return [
        Sample(start_s + 0.1 * i, start_s + 0.1 * i, start_s + 0.1 * i + latency_s, Outcome(code))
        for i, latency_s in enumerate(latencies_s)
    ]


def test_it_has_recovered_after_the_last_slow_or_failed_quarter_of_a_second() -> None:
    steady = _samples([0.02] * 10, start_s=0.0)
    assert recovery_s(_samples([0.01] * 20), steady, 100.0) == 0.0
    assert recovery_s(_samples([0.2] * 3 + [0.01] * 20), steady, 100.0) == 0.25
    failed = _samples([0.01], start_s=101.1, code="overloaded")
    assert recovery_s([*_samples([0.01] * 10), *failed], steady, 100.0) == 1.25


def test_each_part_of_the_promise_can_be_broken() -> None:
    block = LatencyBlock.of([0.002])
    assert block is not None
    good = OverloadResult(
        cores=2,
        capacity_qps=(100.0, 120.0),
        offered_qps=550.0,
        goodput_qps=100.0,
        codes=Counter({OK: 100, "overloaded": 450}),
        late=0,
        refusals=block,
        answers=block,
        send_delay=block,
        memory_mib=(100.0, 110.0, 110.5),
        recovery_s=0.5,
        busy=(1.8, 0.2),
        refusal_ms=2.0,
    )
    assert good.kept
    assert good.goodput == pytest.approx(100 / 110)
    for broken in (
        replace(good, goodput_qps=98.0),
        replace(good, refusal_ms=5.1),
        replace(good, refusals=None),
        replace(good, memory_mib=(100.0, 110.0, 112.0)),
        replace(good, recovery_s=2.25),
    ):
        assert not broken.kept
