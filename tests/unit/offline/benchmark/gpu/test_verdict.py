from __future__ import annotations

from typing import Any

import pytest

from nann.offline.benchmark.gpu.verdict import GATE, judge, where_time_goes


def load(**changed: Any) -> dict[str, Any]:
    good = {
        "loop": "open",
        "failures": 0,
        "qps": 6300.0,
        "pairs_per_s": 110e6,
        "p99_ms": 9.0,
        "recall": 0.992,
        "mean_items_scored": 17_500.0,
    }
    return good | changed


def test_the_gate_is_ten_times_nann_s_t4() -> None:
    assert GATE.qps == 10 * 624
    assert GATE.pairs_per_s == pytest.approx(GATE.qps * GATE.items_scored, rel=0.01)


def test_a_load_that_reaches_everything_meets_it() -> None:
    verdict = judge([load()], items=1_300_000, on_gpu=True)
    assert verdict["met"] is True
    assert verdict["words"].startswith("met: 6,300 QPS at 110 M pairs/s, p99 9.0 ms, recall@200 0.9920")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"qps": 6000.0}, "6,000 QPS, not 6,240"),
        ({"pairs_per_s": 90e6}, "90,000,000 scored pairs/s, not 106,000,000"),
        ({"p99_ms": 12.0}, "p99 12.0 ms, not 10 ms"),
        ({"p99_ms": float("nan")}, "p99 nan ms, not 10 ms"),
        ({"recall": 0.98}, "0.9800 recall@200, not 0.9900"),
        ({"mean_items_scored": 9000.0}, "9,000 items scored a query, not 17,000"),
    ],
)
def test_each_figure_can_miss_it(changed: dict[str, Any], words: str) -> None:
    verdict = judge([load(**changed)], items=1_300_000, on_gpu=True)
    assert verdict["met"] is False
    assert words in verdict["words"]


def test_the_load_that_misses_least_is_named() -> None:
    loads = [load(qps=100.0, p99_ms=50.0), load(qps=7000.0, p99_ms=11.0), load(qps=5000.0)]
    assert judge(loads, items=1_300_000, on_gpu=True)["load"]["qps"] == 7000
    assert judge([*loads, load(qps=6500.0)], items=1_300_000, on_gpu=True)["met"] is True


@pytest.mark.parametrize(
    ("loads", "items", "on_gpu", "words"),
    [
        ([load()], 1_300_000, False, "nothing here was measured on a GPU"),
        ([load()], 20_000, True, "20,000 items are fewer"),
        ([], 1_300_000, True, "no load was measured"),
        ([load(loop="closed")], 1_300_000, True, "no load was measured"),
        ([load(failures=1)], 1_300_000, True, "no load was measured"),
    ],
)
def test_what_cannot_be_judged_is_not(loads: list[Any], items: int, on_gpu: bool, words: str) -> None:
    verdict = judge(loads, items=items, on_gpu=on_gpu)
    assert verdict["met"] is None
    assert words in verdict["words"]


def test_the_longest_phase_comes_first_with_its_share() -> None:
    rows = where_time_goes({"phases_ms": {"gather": 1.0, "score": 3.0}})
    assert [(name, ms, share) for name, ms, share, _ in rows] == [("score", 3.0, 0.75), ("gather", 1.0, 0.25)]
    assert all(remedy for *_, remedy in rows)
