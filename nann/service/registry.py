"""The model versions this process serves: found, loaded, warmed, published, and unloaded in the end.

    source ──> wanted versions ──> load newest first, beside what serves ──> publish ──> unload the others
    (thread)   (policy)            (thread of low priority)                  one assignment on the loop

A version is published by one assignment on the event loop, after its warm-up; until then nobody can
reach it. Whoever uses a version holds a lease on it, and a version goes away only when its last lease is
given back. A load that fails changes nothing but the status: what served goes on serving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nann.engine.errors import (
    ArtifactError,
    InvalidQuery,
    NotReady,
    RetrievalError,
    Unavailable,
    UnknownLabel,
    UnknownModel,
    UnknownVersion,
)
from nann.service.errors import FailedPrecondition, PermissionDenied, error_row
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.served_version import ServedVersion
from nann.service.settings import Settings, SettingsError
from nann.service.types import ModelConfig, VersionStatus
from nann.service.version_loader import LoadEngine, VersionLoader, engine_loader
from nann.service.version_slots import LaneListener, Slot, VersionSlots
from nann.service.version_source import (
    Found,
    ModelSource,
    configured_source,
    find_newest_versions,
    fixed_source,
    scan,
)

__all__ = ["LoadEngine", "Registry", "ServedVersion", "engine_loader", "find_newest_versions"]

log = get_logger(__name__)


class Registry:
    """Model versions by name and number. Lives on the event loop; loading runs on a thread."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        load_engine: LoadEngine | None = None,
        *,
        loader: VersionLoader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._loader = loader or VersionLoader(settings, load_engine)
        self._versions = VersionSlots(settings, metrics, self._loader, clock)
        self._slots = self._versions.by_model
        self._labels: dict[str, Mapping[str, int]] = {}
        self._source: ModelSource = tuple
        self._configured: tuple[ModelConfig, ...] = ()
        self._roots: set[Path] = set()
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[list[Exception]]] = set()
        self._closing = False
        self._last_complaint = ""

    def subscribe(self, listener: LaneListener) -> None:
        """Call ``listener(model, version, proven=…, lanes=…)`` when lanes fall into doubt or out of it.

        A version that goes away has no lanes.
        """
        self._versions.lane_listeners.append(listener)

    # Changes of what is served

    async def load(self) -> None:
        """Load and publish what the settings ask for.

        Raises:
            ArtifactError: nothing to serve, or a version is damaged.
            SettingsError: a setting does not fit a model, or the model config file is wrong.
            FailedPrecondition: a label names a version that is not served.
            BackendError: a warm-up failed.
        """
        self._configure(await asyncio.to_thread(configured_source, self._settings))
        self._versions.logs_failures = False
        failures = await self._change(self._reconcile(self._source, retry=True))
        self._versions.logs_failures = True
        if failures:
            raise failures[0]

    async def rescan(self) -> None:
        """Look at the directories now, try again what failed, and return when all that is done.

        Raises:
            Unavailable: the repository cannot be read.
            NotReady: the server is going away.
        """
        try:
            await self._change(self._reconcile(self._source, retry=True))
        except ArtifactError as error:
            log.error("cannot look for versions", error=str(error))
            raise Unavailable("the model repository cannot be read; the server's log says why") from error

    async def reload(self, configs: Sequence[ModelConfig]) -> None:
        """Serve these models from now on, and no others; returns when their versions are there.

        Raises:
            PermissionDenied: a base path lies elsewhere than what was configured at start.
            FailedPrecondition: a model has no version its policy asks for (nothing has changed then), or
                a label names a version that is not served (the model's labels are as before).
            Unavailable: a version did not load; what served goes on.
            NotReady: the server is going away.
        """
        source = fixed_source(configs, self._settings.repository)

        async def change() -> list[Exception]:
            await asyncio.to_thread(self._check_roots, source())
            for found in await asyncio.to_thread(scan, source):
                self._check_found(found)
            self._source = source
            return await self._reconcile(source, retry=True)

        failures = await self._change(change())
        if failures:
            first = failures[0]
            if isinstance(first, FailedPrecondition):
                raise first
            failed = ", ".join(
                f"{name} version {status.version}: {status.error_message}"
                for name in self._slots
                for status in self.status(name)
                if status.error_message
            )
            raise Unavailable(f"Some models did not become available: {{{failed}}}")

    def _configure(self, source: ModelSource) -> None:
        """Take what the operator's settings or file say, and trust the directories that they name."""
        self._source, self._configured = source, tuple(source())
        base_paths = [config.base_path.parent for config in self._configured]
        self._roots = {path.resolve() for path in (self._settings.repository, *base_paths)}

    async def keep_reading_config(
        self, *, sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    ) -> None:
        """Read the model config file every `model_config_poll_interval_s`; runs until cancelled.

        A file that says something new is as a `reload` of it. One that is wrong, or names a model without a
        version, is refused whole, and tried again at each look.
        """
        self._metrics.file_checked("model_config", refused=False)
        told = ""
        while True:
            await sleep(self._settings.model_config_poll_interval_s)
            complaint = ""
            try:
                failures = await self._change(self._follow_config_file())
                self._metrics.file_checked("model_config", refused=False)
                if failures:
                    log.warning(
                        "not all of the model config file is served", error="; ".join(map(str, failures))
                    )
            except (SettingsError, RetrievalError) as error:
                self._metrics.file_checked("model_config", refused=True)
                complaint = str(error)
                if complaint != told:
                    log.error("the model config file is not used, what it said before holds", error=complaint)
            told = complaint

    async def _follow_config_file(self) -> list[Exception]:
        source = await asyncio.to_thread(configured_source, self._settings)
        if tuple(source()) == self._configured:
            return []
        for found in await asyncio.to_thread(scan, source):
            self._check_found(found)
        self._configure(source)
        log.info("the model config file has changed", models=[config.name for config in self._configured])
        return await self._reconcile(source, retry=True)

    def _check_found(self, found: Found) -> None:
        name = found.config.name
        if found.error is not None:
            raise FailedPrecondition(_public(found.error, name, found.config.base_path))
        for version in found.wanted:
            slot = self._slots.get(name, {}).get(version)
            if slot is not None and slot.served is not None and slot.path != found.versions[version]:
                raise FailedPrecondition(
                    f"version {version} of model {name} is served from elsewhere; give the new one another"
                )

    def _check_roots(self, configs: Sequence[ModelConfig]) -> None:
        """Whoever may call must not make the server read whatever directory it can."""
        for config in configs:
            if not any(config.base_path.resolve().is_relative_to(root) for root in self._roots):
                raise PermissionDenied(f"model {config.name}: its base_path is outside of the repository")

    async def keep_watching(
        self, *, sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    ) -> None:
        """Look at the directories every `poll_interval_s`; runs until cancelled."""
        while True:
            await sleep(self._settings.poll_interval_s)
            try:
                failures = await self._change(self._reconcile(self._source, retry=False))
            except RetrievalError as error:
                failures = [error]
            # Not every second the same line, for as long as a volume is away.
            complaint = "; ".join(map(str, failures))
            if complaint and complaint != self._last_complaint:
                log.warning("what should be served is not all there; what serves goes on", error=complaint)
            self._last_complaint = complaint

    async def _change(self, work: Coroutine[Any, Any, list[Exception]]) -> list[Exception]:
        """Run `work` after the changes before it, to its end even when the caller has gone."""

        async def in_turn() -> list[Exception]:
            async with self._changing:
                return await work

        if self._closing:
            work.close()
            raise NotReady("the server is going away")
        task = asyncio.create_task(in_turn())
        self._changes.add(task)

        def ended(task: asyncio.Task[list[Exception]]) -> None:
            self._changes.discard(task)
            work.close()  # it has not begun where it was cancelled before its turn
            if not task.cancelled():
                task.exception()  # heard, though its caller may have gone

        task.add_done_callback(ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._closing and task.cancelled():
                raise NotReady("the server is going away") from None
            raise

    async def _reconcile(self, source: ModelSource, *, retry: bool) -> list[Exception]:
        """Bring what is served to what `source` asks for; what went wrong on the way."""
        there = await asyncio.to_thread(scan, source)
        for name in self._slots.keys() - {found.config.name for found in there}:
            self._versions.retire(name)
            self._labels.pop(name, None)
        for found in there:
            slots = self._slots.setdefault(found.config.name, {})
            for version in found.wanted:
                slots.setdefault(version, Slot(found.versions[version]))
        failures: list[Exception] = []
        for found in there:
            failures += await self._bring_to(found, retry=retry)
            failures += self._assign_labels(found.config)
        return failures

    async def _bring_to(self, found: Found, *, retry: bool) -> list[Exception]:
        """Load what is wanted of one model and unload the rest, but never its last version for nothing."""
        name = found.config.name
        slots = self._slots[name]
        if found.error is not None:
            # An unmounted volume looks empty too, and whoever wants a model gone takes its directory away.
            return [found.error]
        self._versions.forget_ended(name, keep=found.versions)
        wanted = found.wanted
        missing = [
            version
            for version in sorted(wanted, reverse=True)
            if self._versions.is_due(name, version, retry=retry)
        ]
        outdated = [version for version, slot in slots.items() if slot.served and version not in wanted]
        failures: list[Exception] = []
        if missing and outdated and self._settings.swap_order == "unload-first":
            failures += await self._versions.verify(name, found.versions, missing)
            missing = [version for version in missing if slots[version].error is None]
            if missing:
                await asyncio.gather(*(self._versions.unload(name, version) for version in outdated))
        for version in missing:
            failures += await self._versions.load(name, version, found.versions[version])
        if any(slot.served for version, slot in slots.items() if version in wanted):
            for version in outdated:
                self._versions.unload_soon(name, version)
        elif missing and not any(slot.served for slot in slots.values()):
            for version in sorted(outdated, reverse=True):
                if not await self._versions.load(name, version, slots[version].path):
                    break
        return failures

    def _assign_labels(self, config: ModelConfig) -> list[Exception]:
        slots = self._slots.get(config.name, {})
        for version in config.labels.values():
            if version not in slots or slots[version].served is None:
                return [
                    FailedPrecondition(
                        f"Request to assign label to version {version} of model {config.name}, "
                        "which is not currently available for inference"
                    )
                ]
        self._labels[config.name] = config.labels
        return []

    # Questions

    @property
    def loading(self) -> bool:
        """True while a thread loads a version (it cannot be interrupted)."""
        return self._loader.busy

    def models(self) -> tuple[str, ...]:
        """Names of all models, loading ones too."""
        return tuple(self._slots)

    @property
    def default_model(self) -> str:
        """The only model's name.

        Raises:
            InvalidQuery: several are served, so a query must name one.
            NotReady: the repository has not been read yet.
        """
        if not self._slots:
            raise NotReady("no model has been loaded yet")
        if len(self._slots) > 1:
            raise InvalidQuery(f"name the model: {', '.join(sorted(self._slots))} are served here")
        return next(iter(self._slots))

    def served(
        self, model: str | None = None, *, version: int | None = None, label: str | None = None
    ) -> ServedVersion:
        """The version a query means: the one it names, or the newest available.

        Raises:
            UnknownModel, UnknownVersion, UnknownLabel: there is no such thing here.
            NotReady: there is, and it is not available yet, or none is any more.
            InvalidQuery: no model is named and several are served.
        """
        name = model if model is not None else self.default_model
        slots = self._slots_of(name, version, label)
        available = [slot.served for slot in slots.values() if slot.served is not None]
        if available:
            return max(available, key=lambda served: served.version)
        states = ", ".join(f"version {number} is {slot.state}" for number, slot in slots.items())
        if slots is not self._slots[name] and all(
            slot.state in ("UNLOADING", "END") for slot in slots.values()
        ):
            raise UnknownVersion(f"model {name!r}: {states}")
        raise NotReady(f"model {name!r} is not available: {states or 'it has no version'}")

    def all_served(self) -> Sequence[ServedVersion]:
        """Every available version."""
        return self._versions.served()

    def status(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> list[VersionStatus]:
        """State of every version of `model`, newest first, or of the one named; raises as `served` does."""
        slots = self._slots_of(model, version, label)
        return [
            VersionStatus(number, slot.state)
            if slot.error is None
            else VersionStatus(
                number,
                slot.state,
                error_row(slot.error).tf_grpc_code,
                _public(slot.error, model, slot.path.parent),
            )
            for number, slot in sorted(slots.items(), reverse=True)
        ]

    def _slots_of(self, model: str, version: int | None, label: str | None) -> dict[int, Slot]:
        if model not in self._slots:
            self._refuse_model(model)
        slots = self._slots[model]
        if label is not None:
            version = self._labels.get(model, {}).get(label)
            if version is None:
                raise UnknownLabel(f"Unrecognized servable version label: {label}")
        if version is None:
            return slots
        if version not in slots:
            loaded = ", ".join(str(number) for number in slots)
            raise UnknownVersion(f"model {model!r} has no version {version} here, only {loaded}")
        return {version: slots[version]}

    def _refuse_model(self, model: str) -> NoReturn:
        if not self._slots:
            raise NotReady("no model has been loaded yet")
        raise UnknownModel(f"no model {model!r} here, only {', '.join(sorted(self._slots))}")

    # The end

    def refuse_changes(self) -> None:
        """Begin no further change, and give up on the one that runs: the server is going away."""
        self._closing = True
        for task in self._changes:
            task.cancel()

    async def close(self) -> None:
        """Unpublish every version, finish the queries that hold one, and free it."""
        self.refuse_changes()
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._versions.close()


def _public(error: Exception, model: str, base_path: Path) -> str:
    """What a caller may read of a failed load: no path but that inside the model's own directory."""
    if error_row(error).code == "internal":
        return "internal error; the server's log has it"
    return str(error).replace(str(base_path), model)
