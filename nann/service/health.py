"""Whether this process should get traffic; both transports read it, nobody else decides it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from typing import Any, TypeAlias

from nann.engine.errors import BackendError, RetrievalError
from nann.service.logs import get_logger

__all__ = ["Health", "HealthState", "keep_recovering"]

# Delays between searches that try whether lanes in doubt work again: at once, then doubling.
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0

Version: TypeAlias = tuple[str, int]  # model, version

log = get_logger(__name__)


class HealthState(Enum):
    """Where the process is in its life; only `READY` takes traffic."""

    LOADING = "loading"
    READY = "ready"
    IMPAIRED = "impaired"  # no lane of some model works; a real search must succeed first
    DRAINING = "draining"  # final


class Health:
    """Liveness and readiness of the process. Used from the event loop only.

    Liveness is that the loop answers at all: it depends on no model, device or queue, so a full
    queue never gets the process killed. A version is impaired while none of its lanes is proven
    (`rotation.Rotation`): one device of several that fails takes capacity away, not readiness.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._life = HealthState.LOADING
        self._lanes: dict[Version, tuple[int, int]] = {}  # proven, of all
        self._impaired_since_s: dict[Version, float] = {}
        self._doubt = asyncio.Event()
        self._listeners: list[Callable[[bool], None]] = []

    @property
    def state(self) -> HealthState:
        """The present state, for the body of ``/readyz``."""
        if self._life is HealthState.READY and self._impaired_since_s:
            return HealthState.IMPAIRED
        return self._life

    @property
    def ready(self) -> bool:
        """True when requests may be sent here."""
        return self.state is HealthState.READY

    @property
    def impaired_models(self) -> frozenset[str]:
        """Models with a version of which no lane is proven."""
        return frozenset(model for model, _ in self._impaired_since_s)

    @property
    def doubted(self) -> list[Version]:
        """Versions with a lane that is not proven."""
        return sorted(version for version, (proven, lanes) in self._lanes.items() if proven < lanes)

    def impaired_for_s(self, version: Version) -> float:
        """How long no lane of `version` has been proven; 0 when one is."""
        since_s = self._impaired_since_s.get(version)
        return 0.0 if since_s is None else self._clock() - since_s

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

    def lanes_changed(self, model: str, version: int, *, proven: int, lanes: int) -> None:
        """So many of the `lanes` of a version are proven now; no lanes: the version is gone."""
        key = (model, version)
        if proven < self._lanes.get(key, (lanes, lanes))[0]:
            self._doubt.set()
        self._lanes[key] = (proven, lanes)
        if proven or not lanes:
            self._change(lambda: self._impaired_since_s.pop(key, None))
        else:
            self._change(lambda: self._impaired_since_s.setdefault(key, self._clock()))

    async def wait_for_doubt(self) -> None:
        """Return once lanes have fallen into doubt since the last call."""
        await self._doubt.wait()
        self._doubt.clear()

    def _change(self, change: Callable[[], object]) -> None:
        before = self.state
        change()
        if self.state is not before:
            log.info("readiness changed", ready=self.ready, state=self.state.value)
            for listener in self._listeners:
                listener(self.ready)


async def keep_recovering(
    health: Health,
    probe: Callable[[str, int], Awaitable[None]],
    *,
    give_up_after_s: float = 0.0,
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
) -> None:
    """Run a real search on every lane in doubt (`probe(model, version)`) until it succeeds.

    Runs until it is cancelled. Nothing else would ever find out: traffic does not go there, or not to
    this process any more.

    Raises:
        BackendError: a version has been impaired for `give_up_after_s` (0: never give up). A CUDA context
            that a kernel has broken stays broken for the life of its process, so only a new one can help.
    """
    while True:
        await health.wait_for_doubt()
        delay_s = 0.0
        while health.doubted:
            if await _new_doubt(health, sleep(delay_s)):
                delay_s = 0.0  # it may be another device, which deserves a try of its own at once
            delay_s = min(max(_FIRST_RETRY_S, 2 * delay_s), _LAST_RETRY_S)
            for model, version in health.doubted:
                try:
                    await probe(model, version)
                except RetrievalError as error:
                    log.warning(
                        "lanes still fail", model=model, version=version, error=str(error), next_try_s=delay_s
                    )
                impaired_s = health.impaired_for_s((model, version))
                if give_up_after_s and impaired_s >= give_up_after_s:
                    raise BackendError(
                        f"no search of {model} has succeeded for {impaired_s:.0f} s; giving up, so that "
                        "whoever started this process can start another (--exit-after-impaired-s)"
                    )


async def _new_doubt(health: Health, pause: Coroutine[Any, Any, None]) -> bool:
    """Wait for the end of `pause`, or until more lanes fall into doubt (True)."""
    pausing, doubting = asyncio.ensure_future(pause), asyncio.ensure_future(health.wait_for_doubt())
    try:
        done, _ = await asyncio.wait({pausing, doubting}, return_when=asyncio.FIRST_COMPLETED)
        return doubting in done
    finally:
        pausing.cancel()
        doubting.cancel()
