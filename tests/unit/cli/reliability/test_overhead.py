"""Overhead, throughput and ceiling, measured on fakes: the figures are there, whatever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from nann.cli.reliability.free_engine import FreeEngine, free_server
from nann.cli.reliability.overhead import OverheadResult, Series, measure_overheads
from nann.cli.reliability.raw import batch_failures
from nann.cli.reliability.throughput import Rate, ThroughputResult, engine_qps, measure_ceiling
from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.users import User
from nann.service.pb import retrieval_pb2 as pb

_USERS = [User(user_id=n, history=[n + 1, n + 2]) for n in range(5)]


def test_every_series_is_measured_over_the_no_op(tmp_path: Path) -> None:
    result = measure_overheads(_USERS, tmp_path, engine=None, rounds=2, block=3)
    assert result.requests == 6
    found = {(one.transport, one.name): one for one in result.series}
    assert set(found) == {(transport, name) for transport in ("rest", "grpc") for name in ("free", "no-op")}
    for transport in ("rest", "grpc"):
        assert found[transport, "no-op"].overhead_ms == 0
        assert found[transport, "free"].median_ms > 0


def test_beside_an_engine_that_takes_time_a_no_op_waits_as_long(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    with free_server(tmp_path / "slow", search_s=0.02) as engine:
        result = measure_overheads(_USERS, tmp_path, engine=engine, rounds=1, block=3)
    found = {(one.transport, one.name): one for one in result.series}
    names = ("free", "engine", "no-op", "waiting")
    assert set(found) == {(transport, name) for transport in ("rest", "grpc") for name in names}
    for transport in ("rest", "grpc"):
        noop_ms = found[transport, "no-op"].median_ms
        for name in ("engine", "waiting"):  # the promise is over the plain one
            one = found[transport, name]
            assert one.overhead_ms == pytest.approx(one.median_ms - noop_ms)
    assert "as long a wait as a search" in result.words()


def test_each_transport_has_a_limit_of_its_own() -> None:
    noop = [Series("rest", "no-op", 1.0, 0.0), Series("grpc", "no-op", 1.0, 0.0)]
    for rest_ms, grpc_ms, kept in ((0.5, 0.3, True), (0.51, 0.3, False), (0.5, 0.31, False)):
        series = (*noop, Series("rest", "free", 1.5, rest_ms), Series("grpc", "engine", 1.3, grpc_ms))
        assert OverheadResult(10, series).kept is kept
    assert "REST: no-op 1.000 ms" in OverheadResult(10, (*noop, Series("rest", "free", 1.5, 0.5))).words()


def test_the_ceiling_has_a_rate_for_every_kind_of_call() -> None:
    result = measure_ceiling(_USERS, rounds=1, seconds=0.1)
    assert set(result.rates) == {"REST", "gRPC", "BatchRetrieve", "REST batch"}
    assert all(rate.qps > 0 for rate in result.rates.values())
    assert "BatchRetrieve" in result.words()


def test_a_refused_query_of_a_batch_is_no_answer() -> None:
    outcomes = [
        pb.BatchRetrieveResult(response=pb.RetrieveResponse(n_scored=1)),
        pb.BatchRetrieveResult(error=pb.Error(code="overloaded")),
    ]
    assert batch_failures(pb.BatchRetrieveResponse(results=outcomes).SerializeToString()) == 1
    assert batch_failures(pb.BatchRetrieveResponse(results=outcomes[:1]).SerializeToString()) == 0


def test_an_engine_alone_is_given_full_batches_on_every_lane() -> None:
    engine = FreeEngine(lanes=2, max_batch=3, search_s=0.001)
    seen: set[tuple[int, int]] = set()
    search = engine.search

    def recorded(batch: Any, lane: int) -> Any:
        seen.add((lane, len(batch)))
        return search(batch, lane)

    engine.search = recorded  # type: ignore[method-assign, assignment]
    query = engine.check(Query(k=3, params=SearchParams(), history=[1]))
    assert engine_qps(cast("Any", engine), cast("Any", [query] * 7), 0.05) > 0
    assert seen == {(0, 3), (1, 3)}


def test_the_worst_share_decides() -> None:
    rates = {"REST": Rate(95.0, 1.9, 0.1), "gRPC": Rate(89.0, 1.9, 0.1)}
    assert not ThroughputResult(100.0, rates, {"REST": 0.95, "gRPC": 0.89}).kept
    assert ThroughputResult(100.0, rates, {"REST": 0.95, "gRPC": 0.9}).kept
