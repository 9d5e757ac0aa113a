"""Whether this process should get traffic; both transports read it, nobody else decides it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum

from nann.engine.errors import RetrievalError
from nann.service.logs import get_logger

__all__ = ["Health", "HealthState", "keep_recovering"]

# Delays between searches that try whether an impaired engine works again: at once, then doubling.
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0

log = get_logger(__name__)


class HealthState(Enum):
    """Where the process is in its life; only `READY` takes traffic."""

    LOADING = "loading"
    READY = "ready"
    IMPAIRED = "impaired"  # the last search of a model failed; a real one must succeed first
    DRAINING = "draining"  # final


class Health:
    """Liveness and readiness of the process. Used from the event loop only.

    Liveness is that the loop answers at all: it depends on no model, device or queue, so a full
    queue never gets the process killed.
    """

    def __init__(self) -> None:
        self._life = HealthState.LOADING
        self._impaired: set[str] = set()
        self._impairment = asyncio.Event()
        self._listeners: list[Callable[[bool], None]] = []

    @property
    def state(self) -> HealthState:
        """The present state, for the body of ``/readyz``."""
        if self._life is HealthState.READY and self._impaired:
            return HealthState.IMPAIRED
        return self._life

    @property
    def ready(self) -> bool:
        """True when requests may be sent here."""
        return self.state is HealthState.READY

    @property
    def impaired_models(self) -> frozenset[str]:
        """Models whose last search failed in the engine."""
        return frozenset(self._impaired)

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(ready)` now and whenever `state` changes (gRPC's Watch needs a push)."""
        self._listeners.append(listener)
        listener(self.ready)

    def loaded(self) -> None:
        """Every model is loaded and warm."""
        if self._life is HealthState.LOADING:
            self._change(lambda: setattr(self, "_life", HealthState.READY))

    def draining(self) -> None:
        """The process is going away; nothing leads back."""
        self._change(lambda: setattr(self, "_life", HealthState.DRAINING))

    def search_failed(self, model: str) -> None:
        """A search of `model` failed in the engine."""
        self._change(lambda: self._impaired.add(model))
        self._impairment.set()

    def search_succeeded(self, model: str) -> None:
        """A real search of `model` succeeded."""
        if model in self._impaired:
            self._change(lambda: self._impaired.discard(model))

    async def wait_until_impaired(self) -> None:
        """Return once some model is impaired."""
        while not self._impaired:
            self._impairment.clear()
            await self._impairment.wait()

    def _change(self, change: Callable[[], None]) -> None:
        before = self.state
        change()
        if self.state is not before:
            log.info("readiness changed", ready=self.ready, state=self.state.value)
            for listener in self._listeners:
                listener(self.ready)


async def keep_recovering(
    health: Health,
    probe: Callable[[str], Awaitable[None]],
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Run a real search (`probe(model)`) of every impaired model until it succeeds; runs until cancelled.

    Traffic may have gone elsewhere because of the impairment, so nothing else would ever find out.
    """
    while True:
        await health.wait_until_impaired()
        delay_s = 0.0
        while health.impaired_models:
            await sleep(delay_s)
            delay_s = min(max(_FIRST_RETRY_S, 2 * delay_s), _LAST_RETRY_S)
            for model in sorted(health.impaired_models):
                try:
                    await probe(model)
                except RetrievalError as error:
                    log.warning("still impaired", model=model, error=str(error), next_try_s=delay_s)
