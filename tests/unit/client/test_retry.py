from __future__ import annotations

import pytest
from fake_engine import ManualTime
from nann_client import (
    BackendError,
    BadReply,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidQuery,
    NannError,
    NotReady,
    Overloaded,
    Query,
    RetryPolicy,
    ServerError,
    Unavailable,
    UnknownUser,
)
from nann_client import operations as ops
from nann_client.operations import Operation
from nann_client.retry import Plan, RetryBudget

READ: Operation[object] = ops.retrieve(Query(user_id=1))
WRITE: Operation[object] = ops.record_events(1, [2])
DELETE: Operation[object] = ops.delete_user(1)


class World:
    """Time that stands still, and a pause that is as long as it can be."""

    def __init__(self) -> None:
        self.time = ManualTime()
        self.ranges: list[tuple[float, float]] = []

    def plan(
        self,
        operation: Operation[object] = READ,
        *,
        timeout_s: float = 10.0,
        budget: RetryBudget | None = None,
        policy: RetryPolicy = RetryPolicy(max_attempts=4, first_delay_s=0.1, max_delay_s=0.3),  # noqa: B008
    ) -> Plan:
        return Plan(
            operation,
            timeout_s,
            policy,
            budget or RetryBudget(),
            clock=self.time.clock,
            uniform=self._longest,
        )

    def _longest(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return high


def test_pauses_double_up_to_the_longest_and_end_with_the_attempts() -> None:
    world = World()
    plan = world.plan()
    pauses = []
    for _ in range(4):
        plan.begin()
        pauses.append(plan.pause_s(Unavailable("down")))
    assert pauses == [0.1, 0.2, 0.3, None]
    assert all(low == 0.0 for low, _ in world.ranges)  # full jitter


def test_what_the_server_asks_for_comes_on_top() -> None:
    plan = World().plan()
    plan.begin()
    assert plan.pause_s(Overloaded("full", retry_after_s=2.0)) == pytest.approx(2.1)


def test_a_pause_that_would_outlast_the_call_is_not_begun() -> None:
    world = World()
    plan = world.plan(timeout_s=1.0)
    plan.begin()
    assert plan.pause_s(Overloaded("full", retry_after_s=2.0)) is None
    world.time.advance(0.95)
    assert plan.pause_s(Unavailable("down")) is None


def test_every_try_has_what_is_left_of_the_calls_time() -> None:
    world = World()
    plan = world.plan(timeout_s=1.0)
    deadline_s = plan.begin()
    assert deadline_s == world.time.now_s + 1.0
    world.time.advance(0.4)
    assert plan.begin() == deadline_s
    world.time.advance(0.6)
    with pytest.raises(DeadlineExceeded):
        plan.begin()


@pytest.mark.parametrize(
    "error",
    [
        *(InvalidQuery("x"), UnknownUser("x"), DeadlineExceeded("x")),
        *(ServerError("x"), BadReply("x")),
    ],
)
def test_what_will_not_get_better_is_not_tried_again(error: NannError) -> None:
    plan = World().plan()
    plan.begin()
    assert plan.pause_s(error) is None


@pytest.mark.parametrize("operation", [WRITE, DELETE])
@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Overloaded("refused"), True),
        (NotReady("loading"), True),
        (ConnectionFailed("refused", never_sent=True), True),
        (ConnectionFailed("broke off", never_sent=False), False),
        (Unavailable("the user store does not answer now"), False),
        (BackendError("lost"), False),
    ],
)
def test_what_may_have_been_done_is_not_done_again(
    operation: Operation[object], error: NannError, again: bool
) -> None:
    plan = World().plan(operation)
    plan.begin()
    assert (plan.pause_s(error) is not None) is again
    reading = World().plan()
    reading.begin()
    assert reading.pause_s(error) is not None


def test_in_an_outage_the_budget_ends_the_retries_and_successes_bring_them_back() -> None:
    budget = RetryBudget()
    world = World()

    def retries() -> bool:
        plan = world.plan(budget=budget)
        plan.begin()
        return plan.pause_s(Unavailable("down")) is not None

    assert [retries() for _ in range(6)] == [True] * 4 + [False] * 2
    for _ in range(100):
        world.plan(budget=budget).succeeded()
    assert retries()


def test_an_attempt_may_be_the_only_one() -> None:
    plan = World().plan(policy=RetryPolicy(max_attempts=1))
    plan.begin()
    assert plan.pause_s(Unavailable("down")) is None
