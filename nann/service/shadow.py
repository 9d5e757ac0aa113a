"""Live recall: now and then a query that was answered is searched again exhaustively, off the hot path.

The caller has his answer by then. The second search takes a lane only when nobody waits and another lane
stays free, one at a time in the whole process, and only where scoring everything does not keep the lane
for long. What it finds goes into metrics and nowhere else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nann.engine.errors import RetrievalError
from nann.engine.recall import recall_of_hits
from nann.engine.types import Hits, Query, SearchParams
from nann.service.logs import get_logger
from nann.service.metrics import OTHER_PROFILE, Metrics, ShadowOutcome
from nann.service.served_version import ServedVersion, batcher_limits
from nann.service.settings import Settings

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery

__all__ = ["ShadowSampler"]

_EVERYTHING: Final = SearchParams(policy="exhaustive")

log = get_logger(__name__)


class ShadowSampler:
    """Samples answered queries; lives on the event loop of the service."""

    def __init__(
        self, settings: Settings, metrics: Metrics, *, draw: Callable[[], float] = random.random
    ) -> None:
        """`draw` gives uniform numbers from [0, 1).

        A counter would not do: in a stream of equal batch calls it may pick the same place each time.
        """
        self._settings = settings
        self._share = 1 / settings.shadow_exact_every if settings.shadow_exact_every else 0.0
        self._metrics = metrics
        self._draw = draw
        self._in_flight: asyncio.Task[None] | None = None

    def consider(self, served: ServedVersion, query: Query, prepared: PreparedQuery, hits: Hits) -> None:
        """Perhaps measure the recall of `hits`, which answered `query`; returns at once."""
        if not self._share or query.params.policy == "exhaustive" or self._draw() >= self._share:
            return
        if self._in_flight is not None:
            self._metrics.shadow_sampled(served.name, "in_flight")
            return
        # The lease must be taken before the caller's own ends, hence here and not in the task.
        lease = served.lease()
        lease.__enter__()
        self._in_flight = asyncio.create_task(self._sample(served, query, prepared, hits))

        def ended(task: asyncio.Task[None]) -> None:
            self._in_flight = None
            lease.__exit__(None, None, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("shadow search failed", model=served.name, version=served.version, exc_info=error)
                self._metrics.shadow_sampled(served.name, "failed")

        self._in_flight.add_done_callback(ended)

    async def _sample(self, served: ServedVersion, query: Query, prepared: PreparedQuery, hits: Hits) -> None:
        everything = replace(query, params=_EVERYTHING, with_attributes=False)
        exact = await asyncio.to_thread(served.engine.check, everything)
        if exact.compat == prepared.compat:
            return  # few items were admissible, so the engine had scored them all
        outcome = await self._measure(served, query, exact, hits)
        self._metrics.shadow_sampled(served.name, outcome)

    async def _measure(
        self, served: ServedVersion, query: Query, exact: PreparedQuery, hits: Hits
    ) -> ShadowOutcome:
        limit = (
            self._settings.shadow_exact_max_items
            or batcher_limits(self._settings, served.engine).batch_work_limit
        )
        if exact.cost > limit:
            return "too_large"
        try:
            answer = await served.batcher.search_if_idle(exact)
        except RetrievalError as error:
            log.warning("shadow search failed", model=served.name, version=served.version, error=str(error))
            return "failed"
        if answer is None:
            return "busy"
        recall = recall_of_hits(hits, answer.result, query.k)
        self._metrics.observe_shadow_recall(served.name, _profile_of(served, query.params), recall)
        return "measured"


def _profile_of(served: ServedVersion, params: SearchParams) -> str:
    """The profile that has these parameters, so that the labels are as few as the profiles."""
    return next((name for name, profile in served.profiles.items() if profile == params), OTHER_PROFILE)
