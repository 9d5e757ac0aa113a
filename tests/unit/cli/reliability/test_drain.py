"""Terminations of a server whose searches sleep, and how a log is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import orjson

from nann.cli.reliability.drain import DrainResult, Pressure, drain_once, taken_up
from nann.cli.reliability.free_engine import free_server
from nann.offline.benchmark.load import OK
from nann.offline.benchmark.users import User

_USERS = [User(user_id=n, history=[n + 1, n + 2]) for n in range(5)]


def test_a_server_is_terminated_while_requests_wait(tmp_path: Path) -> None:
    result = drain_once(
        lambda: free_server(tmp_path, search_s=0.1, access_log=True, log_format="json"),
        tmp_path / "free.log",
        _USERS,
        Pressure(before_s=0.8, after_s=0.3, burst=20),
        50.0,
        seed=0,
    )
    # Not what was lost: on a busy machine a call may take longer than the margin to be taken up.
    assert result.unclean == 0
    assert result.in_flight > 0
    assert result.accepted > 0
    assert result.after
    assert result.exit_codes == Counter({0: 1})


def test_the_log_is_read_by_api_and_code() -> None:
    lines = [
        {"event": "listening"},
        {"event": "request", "api": "rest", "code": "ok"},
        {"event": "request", "api": "rest", "code": "ok"},
        {"event": "request", "api": "grpc", "code": "overloaded"},
        {"event": 'a "request" in words'},
    ]
    log = b"\n".join(orjson.dumps(line) for line in lines) + b'\nno JSON, and no "requests" either'
    assert taken_up(log) == {("rest", "ok"): 2, ("grpc", "overloaded"): 1}


def test_one_lost_answer_breaks_the_promise() -> None:
    total = DrainResult(capacity_qps=100.0)
    for lost in (0, 0, 1):
        assert not total.lost
        total.add(DrainResult(1, 5, 50, lost, Counter({OK: 2}), 0, Counter({0: 1}), 1.5))
    assert (total.terminations, total.accepted, total.after) == (3, 150, {OK: 6})
    assert not total.kept
    assert "of 150 accepted 1 without" in total.words()
