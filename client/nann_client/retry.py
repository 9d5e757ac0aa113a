"""When to try again: a policy a client, a budget that its calls share, a plan a call. Nothing here waits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nann_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    NannError,
    NotReady,
    Overloaded,
    Unavailable,
)
from nann_client.operations import Operation

__all__ = ["Plan", "RetryBudget", "RetryPolicy"]

_MULTIPLIER: Final = 2.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast a call is tried again.

    The pause before the n-th retry is random between 0 and ``first_delay_s * 2**(n - 1)``, at most
    `max_delay_s`, on top of what the server asked for (Retry-After): callers who failed together do not
    come back together. ``max_attempts=1`` never tries again.
    """

    max_attempts: int = 3
    first_delay_s: float = 0.05
    max_delay_s: float = 1.0


class RetryBudget:
    """Keeps retries from feeding an outage: without it each call would cost a failing server three.

    gRPC's throttling (proposal A6): a failure that may be retried takes a token, a success gives a tenth
    back, and nothing is retried while half of the tokens or fewer are left. Safe to share among threads.
    """

    def __init__(self, tokens: float = 10.0, *, refill: float = 0.1) -> None:
        self._most = self._tokens = tokens
        self._refill = refill
        self._lock = threading.Lock()

    def spend(self) -> bool:
        """Take a token for a failure; whether enough are left to try again."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1)
            return self._tokens > self._most / 2

    def earn(self) -> None:
        """A call succeeded."""
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._refill)


class Plan:
    """The tries of one call, up to its deadline."""

    def __init__(
        self,
        operation: Operation[Any],
        timeout_s: float,
        policy: RetryPolicy,
        budget: RetryBudget,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._operation = operation
        self._policy = policy
        self._budget = budget
        self._clock = clock
        self._uniform = uniform
        self._deadline_s = clock() + timeout_s
        self._attempts = 0

    def begin(self) -> float:
        """Begin a try: by when, on `clock`, it must end; raises DeadlineExceeded when that is past."""
        self._attempts += 1
        if self._clock() >= self._deadline_s:
            raise DeadlineExceeded("no time was left for the call", code="deadline_exceeded")
        return self._deadline_s

    def succeeded(self) -> None:
        """The try brought an answer."""
        self._budget.earn()

    def pause_s(self, error: NannError) -> float | None:
        """How long to wait before the next try, None when `error` is the answer."""
        if not isinstance(error, Unavailable):
            return None
        enough = self._budget.spend()
        if not enough or self._attempts >= self._policy.max_attempts or not self._may_repeat(error):
            return None
        longest_s = min(
            self._policy.first_delay_s * _MULTIPLIER ** (self._attempts - 1), self._policy.max_delay_s
        )
        pause_s = (error.retry_after_s or 0.0) + self._uniform(0.0, longest_s)
        # Whoever would come back too late hears at once that there is nothing to wait for.
        return pause_s if self._clock() + pause_s < self._deadline_s else None

    def _may_repeat(self, error: Unavailable) -> bool:
        if isinstance(error, Overloaded | NotReady):  # refused before anything was done
            return True
        if isinstance(error, ConnectionFailed) and error.never_sent:
            return True
        return self._operation.repeatable
