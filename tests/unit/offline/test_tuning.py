"""Which measured settings become the profiles, and which are worth measuring."""

from __future__ import annotations

from typing import Any

from nann.engine.types import SearchParams
from nann.offline.tuning import PROFILE_TARGETS, Target, choose_profiles, pareto_front, walks


def _row(name: str, recall: float, cost: float, p50: float) -> dict[str, Any]:
    return {
        "name": name,
        "recall": recall,
        "cost": cost,
        "latency_ms": {"p50": p50},
        "params": {"ef": round(cost)},
    }


ROWS = [
    _row("a", 0.90, 500, 3.0),
    _row("b", 0.96, 700, 2.0),  # cheaper to score is not faster
    _row("c", 0.97, 900, 2.5),
    _row("d", 0.97, 950, 2.2),
    _row("e", 0.995, 2000, 6.0),
]


def test_a_recall_is_reached_at_the_least_cost() -> None:
    profiles, reached = choose_profiles(ROWS, {"low": Target(recall=0.95), "high": Target(recall=0.97)})
    assert profiles["low"] == {"policy": "best_first", "ef": 700}
    assert profiles["high"]["ef"] == 900
    assert profiles["exact"] == {"policy": "exhaustive"}
    assert reached == {"low": True, "high": True, "exact": True}


def test_where_nothing_reaches_a_recall_the_most_is_taken_and_said() -> None:
    profiles, reached = choose_profiles(ROWS, {"never": Target(recall=0.999)})
    assert (profiles["never"]["ef"], reached["never"]) == (2000, False)


def test_a_latency_buys_the_most_recall() -> None:
    targets = {"quick": Target(latency_ms=2.4), "any": Target(latency_ms=100), "none": Target(latency_ms=0.1)}
    profiles, reached = choose_profiles(ROWS, targets)
    assert [profiles[name]["ef"] for name in targets] == [950, 2000, 700]
    assert reached == {"quick": True, "any": True, "none": False, "exact": True}


def test_the_front_depends_on_what_is_paid() -> None:
    assert [row["name"] for row in pareto_front(ROWS, "cost")] == ["a", "b", "c", "e"]
    assert [row["name"] for row in pareto_front(ROWS, "latency_ms")] == ["b", "d", "e"]
    assert pareto_front([], "cost") == []


def test_what_is_tried_holds_the_answer_once_and_gates_only_where_there_are_tables() -> None:
    plain, gated = walks(500, gated=False), walks(500, gated=True)
    assert gated[: len(plain)] == plain
    params = [setting.params for setting in gated]
    assert len(set(params)) == len(params)
    assert all(isinstance(one, SearchParams) and one.ef >= 500 for one in params)
    assert not any(setting.params.gate_width for setting in plain)
    assert any(one.gate_width for one in params)
    assert len({setting.name for setting in gated}) == len(gated)


def test_the_usual_profiles_are_the_two_that_servers_know() -> None:
    assert set(PROFILE_TARGETS) == {"fast", "balanced"}
