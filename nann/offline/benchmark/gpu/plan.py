"""A report in steps under one clock: a slow step is cut, the report is not.

Each step has a time of its own and may stop early at its `Deadline`, keeping what it has. A step that
fails, or for which no time is left, is told of in the report and the next one runs.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Deadline", "Step", "StepResult", "run_plan", "watchdog"]

Status = Literal["done", "cut", "failed", "not run"]


class Deadline:
    """When a step should end, and what it left out to end in time."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + seconds
        self.left_out: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds that are left; negative when it has passed."""
        return self._end_s - self._clock()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; if not, `what` is noted as left out."""
        if self.left_s > seconds:
            return True
        self.left_out.append(what)
        return False


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement: ``run(deadline)`` returns its figures.

    It is not begun with less than `least_s` left on the report's clock, nor when a step it `needs` did
    not run. It is given at most `seconds`, and less when those of all steps to come are more than is left:
    then its part of that, but at least `least_s`.
    """

    name: str
    seconds: float
    run: Callable[[Deadline], dict[str, Any]]
    least_s: float = 0.0
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class StepResult:
    """What came of a step. `why` says what was left out, what went wrong, or why it was not run."""

    name: str
    status: Status
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.status in ("done", "cut")


def run_plan(
    steps: Sequence[Step],
    *,
    seconds: float,
    on_result: Callable[[StepResult], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, StepResult]:
    """Run the steps in order within about `seconds`; each result is also given to `on_result` at once."""
    end_s = clock() + seconds
    results: dict[str, StepResult] = {}
    for position, step in enumerate(steps):
        share = step.seconds / sum(later.seconds for later in steps[position:])
        result = _run(step, share, results, end_s, clock)
        results[step.name] = result
        on_result(result)
    return results


def _run(
    step: Step,
    share: float,
    results: dict[str, StepResult],
    end_s: float,
    clock: Callable[[], float],
) -> StepResult:
    missing = [name for name in step.needs if name not in results or not results[name].measured]
    if missing:
        return StepResult(step.name, "not run", why=f"it needs {', '.join(missing)}, without result")
    started_s = clock()
    left_s = end_s - started_s
    if left_s <= step.least_s:
        return StepResult(
            step.name, "not run", why=f"{max(left_s, 0):.0f} s were left, and it takes {step.least_s:.0f} s"
        )
    deadline = Deadline(min(step.seconds, max(step.least_s, share * left_s)), clock)
    try:
        figures = step.run(deadline)
    except Exception as error:  # whatever breaks one measurement, the others are still worth having
        traceback.print_exc()
        words = " ".join(str(error).split())[:500] or "no message"
        why = f"{type(error).__name__}: {words}"
        return StepResult(step.name, "failed", clock() - started_s, why=why)
    left_out = "; ".join(deadline.left_out)
    status: Status = "cut" if left_out else "done"
    return StepResult(
        step.name, status, clock() - started_s, figures, f"left out for time: {left_out}" if left_out else ""
    )


@contextmanager
def watchdog(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` on another thread when the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
