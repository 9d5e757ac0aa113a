"""Where each version is in its life, and the steps of that life: load and publish, fail, unload."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from nann.engine.errors import ArtifactError, RetrievalError
from nann.service.batcher import Batcher
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.served_version import ServedVersion, batcher_limits
from nann.service.settings import Settings
from nann.service.types import VersionState
from nann.service.version_loader import VersionLoader

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery, SearchEngine
    from nann.engine.types import Hits

__all__ = ["LaneListener", "Slot", "VersionSlots"]

# A version that failed to load is tried again after so long, then after twice that, and so on: what was
# wrong may pass (memory, a volume, a copy that was not finished), and reading gigabytes in vain costs.
_FIRST_RETRY_S: Final = 10.0
_LAST_RETRY_S: Final = 600.0

log = get_logger(__name__)


class LaneListener(Protocol):
    def __call__(self, model: str, version: int, *, proven: int, lanes: int) -> None: ...


@dataclass(slots=True)
class Slot:
    """Where one version is in its life; `served` from AVAILABLE until it is unloaded."""

    path: Path
    state: VersionState = "START"
    error: Exception | None = None
    failures: int = 0
    retry_at_s: float = 0.0
    served: ServedVersion | None = None


class VersionSlots:
    """Slots by model and version number, on the event loop; the registry decides what to load."""

    def __init__(
        self, settings: Settings, metrics: Metrics, loader: VersionLoader, clock: Callable[[], float]
    ) -> None:
        self.by_model: dict[str, dict[int, Slot]] = {}
        self.lane_listeners: list[LaneListener] = []
        self.logs_failures = True  # not while whoever asked for a load will say himself why it failed
        self._settings = settings
        self._metrics = metrics
        self._loader = loader
        self._clock = clock
        self._unload_first = settings.swap_order == "unload-first"
        self._unloading: set[asyncio.Task[None]] = set()

    def served(self) -> list[ServedVersion]:
        """Every available version."""
        return [
            slot.served
            for slots in self.by_model.values()
            for slot in slots.values()
            if slot.served is not None
        ]

    def is_due(self, name: str, version: int, *, retry: bool) -> bool:
        """Whether to load a version that is wanted; `retry` leaves out the pause after a failure."""
        slot = self.by_model[name].get(version)
        if slot is None or (slot.served is None and slot.error is None):
            return True
        return slot.served is None and (retry or self._clock() >= slot.retry_at_s)

    async def verify(self, name: str, paths: Mapping[int, Path], versions: Sequence[int]) -> list[Exception]:
        """Find the damaged ones of `versions` while there is still something that serves."""
        failures: list[Exception] = []
        for version in versions:
            slot = self.by_model[name].setdefault(version, Slot(paths[version]))
            slot.error = None
            try:
                await self._loader.verify(slot.path)
            except ArtifactError as error:
                self._failed(name, version, error)
                failures.append(error)
        return failures

    async def load(self, name: str, version: int, path: Path) -> list[Exception]:
        """Load and publish one version; empty, or the one error that it failed with."""
        slot = self.by_model[name].setdefault(version, Slot(path))
        slot.path, slot.state, slot.error = path, "LOADING", None
        self._metrics.version_loading(name, version)
        log.info("loading", model=name, version=version)
        try:
            engine, load_s = await self._loader.load(path, beside_others=bool(self.served()))
            try:
                served = ServedVersion(
                    name,
                    version,
                    engine,
                    self._make_batcher(name, version, engine),
                    self._settings.default_profile,
                )
            except Exception:
                engine.close()
                raise
        except Exception as error:
            self._failed(name, version, error)
            return [error]
        slot.served, slot.state, slot.failures = served, "AVAILABLE", 0
        self._metrics.version_ready(
            name,
            version,
            n_items=engine.manifest.num_items,
            load_s=load_s,
            compilations=lambda: engine.n_compilations,
            process=lambda: engine.lane_process,
            measured_recall=engine.manifest.quality.get("recall"),
        )
        log.info("loaded", model=name, version=version, load_s=round(load_s, 3))
        return []

    def _failed(self, name: str, version: int, error: Exception) -> None:
        slot = self.by_model[name][version]
        slot.state, slot.error = "END", error
        # Under unload-first every try takes away what serves, so it is left to whoever asks for one.
        delay_s = math.inf if self._unload_first else min(_FIRST_RETRY_S * 2**slot.failures, _LAST_RETRY_S)
        slot.failures += 1
        slot.retry_at_s = self._clock() + delay_s
        self._metrics.load_failed(name, version)
        if not self.logs_failures:
            return
        ours = isinstance(error, RetrievalError | ValueError)
        log.error(
            "load failed",
            model=name,
            version=version,
            error=str(error),
            next_try_s=delay_s if math.isfinite(delay_s) else None,
            exc_info=None if ours else error,
        )

    def unload_soon(self, name: str, version: int) -> None:
        """Unload in the background: a lease that is not given back must not stop the next swap."""
        task = asyncio.create_task(self.unload(name, version, self.by_model[name][version]))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def unload(self, name: str, version: int, slot: Slot | None = None) -> None:
        """Take a version out of reach, and free it when its last user has left."""
        slot = slot or self.by_model[name][version]
        if slot.served is None:
            return
        served, slot.served, slot.state = slot.served, None, "UNLOADING"
        self._tell_lanes(name, version, 0, 0)
        self._metrics.version_gone(name, version)
        log.info("unloading", model=name, version=version)
        await served.close(self._loader.free)
        slot.state = "END"
        log.info("unloaded", model=name, version=version)

    def forget_ended(self, name: str, keep: Mapping[int, Path]) -> None:
        """Drop what has ended and is not on disk any more."""
        slots = self.by_model[name]
        for version in [v for v, slot in slots.items() if slot.state == "END" and v not in keep]:
            del slots[version]
            self._metrics.version_gone(name, version)

    def retire(self, name: str) -> None:
        """Unload a model that is not to be served any more."""
        for version in self.by_model[name]:
            self.unload_soon(name, version)
        del self.by_model[name]

    async def close(self) -> None:
        """Unload everything, and return when that is done."""
        for name, slots in self.by_model.items():
            for version in slots:
                self.unload_soon(name, version)
        await asyncio.gather(*self._unloading)

    def _make_batcher(self, name: str, version: int, engine: SearchEngine) -> Batcher[PreparedQuery, Hits]:
        limits, n_lanes = batcher_limits(self._settings, engine), engine.n_lanes

        def lanes_changed(proven: int) -> None:
            slot = self.by_model.get(name, {}).get(version)
            if slot is not None and slot.served is not None:  # else it drains, and nobody depends on it
                self._tell_lanes(name, version, proven, n_lanes)

        return Batcher(
            engine.search, limits, observer=self._metrics.batch_observer(name), on_lanes=lanes_changed
        )

    def _tell_lanes(self, name: str, version: int, proven: int, lanes: int) -> None:
        self._metrics.lanes_changed(name, version, doubted=lanes - proven)
        for listener in self.lane_listeners:
            listener(name, version, proven=proven, lanes=lanes)
