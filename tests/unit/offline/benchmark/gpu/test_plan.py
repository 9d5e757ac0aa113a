from __future__ import annotations

import threading
from typing import Any

import pytest

from nann.offline.benchmark.gpu.plan import Deadline, Step, StepResult, run_plan, watchdog


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(steps: list[Step], clock: Clock, seconds: float = 100.0) -> dict[str, StepResult]:
    seen: list[str] = []
    results = run_plan(steps, seconds=seconds, on_result=lambda result: seen.append(result.name), clock=clock)
    assert seen == [step.name for step in steps] == list(results)
    return results


def taking(clock: Clock, seconds: float, **figures: Any) -> Any:
    def measure(_deadline: Deadline) -> dict[str, Any]:
        clock.now_s += seconds
        return figures

    return measure


def test_a_step_hands_its_figures_on() -> None:
    clock = Clock()
    results = run([Step("a", 10, taking(clock, 3, x=1))], clock)
    assert results["a"] == StepResult("a", "done", 3, {"x": 1})


def test_a_failure_is_told_and_the_next_step_runs(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()

    def fail(_deadline: Deadline) -> dict[str, Any]:
        raise RuntimeError("out of\n  memory")

    results = run(
        [Step("a", 10, fail), Step("b", 10, taking(clock, 1)), Step("c", 1, fail, needs=("a",))], clock
    )
    assert (results["a"].status, results["a"].why) == ("failed", "RuntimeError: out of memory")
    assert results["b"].status == "done"
    assert (results["c"].status, results["c"].why) == ("not run", "it needs a, without result")
    assert "RuntimeError" in capsys.readouterr().err


def test_a_step_stops_at_its_deadline_and_says_what_it_left_out() -> None:
    clock = Clock()

    def measure(deadline: Deadline) -> dict[str, Any]:
        rows = []
        for name in "pqrs":
            if deadline.allows(name, 2):
                clock.now_s += 4
                rows.append(name)
        return {"rows": rows}

    results = run([Step("a", 10, measure)], clock)
    assert (results["a"].status, results["a"].figures) == ("cut", {"rows": ["p", "q"]})
    assert results["a"].why == "left out for time: r; s"
    assert results["a"].measured


def test_no_step_begins_without_the_time_it_takes() -> None:
    clock = Clock()
    steps = [Step("a", 10, taking(clock, 97)), Step("b", 10, taking(clock, 1), least_s=4)]
    results = run([*steps, Step("c", 10, taking(clock, 1), least_s=2)], clock)
    assert (results["b"].status, results["b"].why) == ("not run", "3 s were left, and it takes 4 s")
    assert results["c"].status == "done"


def test_steps_share_what_is_left_when_it_is_too_little() -> None:
    clock = Clock()
    given: list[float] = []

    def note(deadline: Deadline) -> dict[str, Any]:
        given.append(deadline.left_s)
        clock.now_s += 1
        return {}

    run([Step("a", 60, note), Step("b", 30, note, least_s=8), Step("c", 10, note)], clock, seconds=20)
    assert given == pytest.approx([12, 19 * 30 / 40, 10])
    given.clear()
    run([Step("a", 10, note), Step("b", 30, note)], clock, seconds=1000)
    assert given == pytest.approx([10, 30])


def test_the_watchdog_bites_a_block_that_hangs_and_no_other() -> None:
    bitten = threading.Event()
    with watchdog(0.01, bitten.set):
        assert bitten.wait(30)
    quiet = threading.Event()
    with watchdog(3600, quiet.set):
        pass
    assert not quiet.is_set()
