"""What is sent when a contender is timed; never how long it takes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time


def test_single_requests_go_round_after_a_warm_up() -> None:
    sent: list[list[int]] = []
    budget = TimingBudget(requests=5, latency_s=100.0, warm_up_requests=2)
    found = one_at_a_time(lambda rows: sent.append(list(rows)), [7, 8, 9], budget)
    assert len(found) == 5
    assert sent == [[7], [8], [7], [8], [9], [7], [8]]


def test_a_slow_contender_is_cut_short_but_not_below_a_dozen() -> None:
    budget = TimingBudget(requests=1000, latency_s=0.0, warm_up_requests=0)
    assert len(one_at_a_time(lambda _rows: None, [1], budget)) == 12


def test_every_lane_sends_whole_batches() -> None:
    sent: dict[int, list[list[int]]] = {0: [], 1: []}
    lock = threading.Lock()

    def answer(rows: Sequence[int], lane: int) -> None:
        with lock:
            sent[lane].append(list(rows))

    qps = keep_busy(answer, list(range(5)), TimingBudget(load_s=0.0), lanes=2, batch=3)
    assert qps > 0
    assert sent == {0: [[0, 1, 2], [3, 4, 0]], 1: [[3, 4, 0], [1, 2, 3]]}  # a warm-up, and one that counts


def test_a_failure_in_one_lane_ends_all() -> None:
    def answer(rows: Sequence[int], lane: int) -> None:
        if lane == 1:
            raise KeyError("planted")

    with pytest.raises((KeyError, threading.BrokenBarrierError)):
        keep_busy(answer, [0], TimingBudget(load_s=0.0), lanes=2, batch=1)
