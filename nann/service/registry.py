"""The model versions this process serves: found in the repository, loaded, warmed, then published.

A version is published by one assignment on the event loop, after its warm-up; until then nobody can
reach it. Whoever uses a version holds a lease on it, and a version goes away only when its last
lease is given back: the seam for swapping versions under traffic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nann.engine.errors import (
    ArtifactError,
    InvalidQuery,
    NotReady,
    UnknownLabel,
    UnknownModel,
    UnknownVersion,
)
from nann.engine.types import SearchParams
from nann.service.batcher import Batcher, BatcherLimits
from nann.service.errors import error_row
from nann.service.lane import Lane
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.settings import Settings, SettingsError
from nann.service.types import ModelMetadata, VersionState, VersionStatus

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery, SearchEngine
    from nann.engine.types import Hits

__all__ = ["LoadEngine", "Registry", "ServedVersion", "engine_loader", "find_newest_versions"]

LoadEngine = Callable[[Path], "SearchEngine"]
_USUAL_PROFILE = "balanced"

log = get_logger(__name__)


def engine_loader(settings: Settings) -> LoadEngine:
    """What loads and warms one version as `settings` say; blocking, and the first to import TensorFlow."""

    def load(version_dir: Path) -> SearchEngine:
        from nann.engine.search_engine import SearchEngine

        engine = SearchEngine.load(
            version_dir,
            device="cpu" if settings.device == "auto" else settings.device,
            lanes=settings.lanes,
            max_batch=settings.max_batch_size,
            verify=settings.verify,
            xla_cache_dir=settings.xla_cache_dir,
            max_k=settings.max_k,
            intra_op_threads=settings.intra_op_threads,
        )
        if not engine.warm_up().bit_equal:
            log.warning(
                "scores depend on the shape they are computed in: equal queries may get unequal answers",
                model=engine.manifest.model_name,
            )
        return engine

    return load


def find_newest_versions(repository: Path, model: str | None) -> dict[str, tuple[int, Path]]:
    """The newest version of `model`, or of every model, by name: number and directory.

    Raises:
        ArtifactError: the repository, the model in it, or a version of that is not there.
    """
    if not repository.is_dir():
        raise ArtifactError(str(repository), expected="a model repository", found="no directory")
    names = (
        [model] if model is not None else sorted(path.name for path in repository.iterdir() if path.is_dir())
    )
    newest: dict[str, tuple[int, Path]] = {}
    for name in names:
        directory = repository / name
        if not directory.is_dir():
            raise ArtifactError(str(directory), expected="a model directory", found="no directory")
        # A version under construction has a name that is no number (the contract's atomic publish).
        versions = [(int(path.name), path) for path in directory.iterdir() if _is_version(path)]
        if versions:
            newest[name] = max(versions)
        elif model is not None:
            raise ArtifactError(str(directory), expected="a version directory named 1, 2, …", found="none")
    if not newest:
        raise ArtifactError(str(repository), expected="<model>/<version>/ directories", found="none")
    return newest


def _is_version(path: Path) -> bool:
    return path.is_dir() and path.name.isascii() and path.name.isdigit() and not path.name.startswith("0")


class ServedVersion:
    """One loaded version with its batcher and search profiles; used under `lease`."""

    def __init__(
        self,
        name: str,
        version: int,
        engine: SearchEngine,
        batcher: Batcher[PreparedQuery, Hits],
        default_profile: str | None,
    ) -> None:
        self.name = name
        self.version = version
        self.engine = engine
        self.batcher = batcher
        self.profiles = _profiles(engine.profiles)
        self.default_params = self._default_params(default_profile)
        self._leases = 0
        self._unused = asyncio.Event()

    @property
    def metadata(self) -> ModelMetadata:
        """What a client must know to call this version."""
        manifest = self.engine.manifest
        return ModelMetadata(
            model=self.name,
            version=self.version,
            num_items=manifest.num_items,
            history_length=manifest.history_length,
            input_dim=manifest.input_dim,
            item_id_type=manifest.item_id_type,
            user_id_type=manifest.user_id_type,
            profiles=tuple(sorted(self.profiles)),
        )

    @contextmanager
    def lease(self) -> Iterator[ServedVersion]:
        """Keep this version alive while the block runs."""
        self._leases += 1
        try:
            yield self
        finally:
            self._leases -= 1
            if not self._leases:
                self._unused.set()

    async def close(self) -> None:
        """Wait for the last lease, finish what is queued, free the engine. No lease may follow."""
        while self._leases:
            self._unused.clear()
            await self._unused.wait()
        await self.batcher.close()
        self.engine.close()

    def _default_params(self, default_profile: str | None) -> SearchParams:
        if default_profile is None:
            return self.profiles.get(_USUAL_PROFILE, SearchParams())
        if default_profile not in self.profiles:
            raise SettingsError(
                f"--default-profile {default_profile}: {self.name} version {self.version} has only "
                + ", ".join(sorted(self.profiles))
            )
        return self.profiles[default_profile]


def _profiles(profiles: Mapping[str, Mapping[str, Any]]) -> dict[str, SearchParams]:
    try:
        return {
            name: SearchParams(**{**fields, "level_topn": tuple(fields.get("level_topn", ()))})
            for name, fields in profiles.items()
        }
    except TypeError as error:
        raise ArtifactError(
            "manifest.json", expected="profiles of SearchParams fields", found=str(error)
        ) from None


@dataclass(slots=True)
class _Slot:
    """Where one version is in its life; `served` from AVAILABLE until it is unloaded."""

    path: Path
    state: VersionState = "START"
    error: Exception | None = None
    served: ServedVersion | None = None


class Registry:
    """Model versions by name and number. Lives on the event loop; loading runs on a thread."""

    def __init__(self, settings: Settings, metrics: Metrics, load_engine: LoadEngine | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._load_engine = load_engine or engine_loader(settings)
        self._slots: dict[str, dict[int, _Slot]] = {}
        self._loading_lane: Lane | None = None

    async def load(self) -> None:
        """Load and publish the newest version of every model that the settings name.

        Raises:
            ArtifactError: nothing to serve, or a version is damaged.
            SettingsError: a setting does not fit a model.
            BackendError: a warm-up failed.
        """
        newest = find_newest_versions(self._settings.repository, self._settings.model)
        self._slots = {name: {version: _Slot(path)} for name, (version, path) in newest.items()}
        for name, (version, _) in newest.items():
            await self._load_version(name, version)

    async def _load_version(self, name: str, version: int) -> None:
        slot = self._slots[name][version]
        slot.state = "LOADING"
        log.info("loading", model=name, version=version)
        started_s = time.monotonic()
        self._loading_lane = lane = Lane(f"nann-load-{name}-{version}")
        try:
            engine = await lane.call(lambda: self._load_engine(slot.path))
            served = ServedVersion(
                name, version, engine, self._make_batcher(name, engine), self._settings.default_profile
            )
        except Exception as error:
            slot.state, slot.error = "END", error
            raise
        finally:
            lane.close()
        load_s = time.monotonic() - started_s
        slot.served, slot.state = served, "AVAILABLE"
        self._metrics.version_ready(
            name,
            version,
            n_items=engine.manifest.num_items,
            load_s=load_s,
            compilations=lambda: engine.n_compilations,
        )
        log.info("loaded", model=name, version=version, load_s=round(load_s, 3))

    def _make_batcher(self, name: str, engine: SearchEngine) -> Batcher[PreparedQuery, Hits]:
        limits = BatcherLimits(
            n_lanes=engine.n_lanes,
            max_batch=engine.max_batch,
            queue_limit=self._settings.queue_limit,
            queue_work_limit=self._settings.queue_work_limit,
            batch_wait_s=self._settings.batch_wait_ms / 1e3,
        )
        return Batcher(engine.search, limits, observer=self._metrics.batch_observer(name))

    # Questions

    @property
    def loading(self) -> bool:
        """True while a thread loads a version (it cannot be interrupted)."""
        return self._loading_lane is not None and self._loading_lane.busy

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
            NotReady: there is, and it is not available (yet, or any more).
            InvalidQuery: no model is named and several are served.
        """
        name = model if model is not None else self.default_model
        slots = self._slots_of(name, version, label)
        available = [slot.served for slot in slots.values() if slot.served is not None]
        if not available:
            states = ", ".join(f"version {number} is {slot.state}" for number, slot in slots.items())
            raise NotReady(f"model {name!r} is not available: {states}")
        return max(available, key=lambda served: served.version)

    def all_served(self) -> Sequence[ServedVersion]:
        """Every available version."""
        return [
            slot.served
            for slots in self._slots.values()
            for slot in slots.values()
            if slot.served is not None
        ]

    def status(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> list[VersionStatus]:
        """State of every version of `model`, newest first, or of the one named; raises as `served` does."""
        slots = self._slots_of(model, version, label)
        return [
            VersionStatus(number, slot.state)
            if slot.error is None
            else VersionStatus(number, slot.state, error_row(slot.error).tf_grpc_code, str(slot.error))
            for number, slot in sorted(slots.items(), reverse=True)
        ]

    def _slots_of(self, model: str, version: int | None, label: str | None) -> dict[int, _Slot]:
        if model not in self._slots:
            self._refuse_model(model)
        slots = self._slots[model]
        if label is not None:
            # Labels are assigned by whoever swaps versions; with the newest alone served there are none.
            raise UnknownLabel(f"model {model!r} has no version label {label!r}")
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

    async def close(self) -> None:
        """Unpublish every version, finish the queries that hold one, and free it."""
        for name, slots in self._slots.items():
            for version, slot in slots.items():
                if slot.served is None:
                    continue
                served, slot.served, slot.state = slot.served, None, "UNLOADING"
                self._metrics.version_gone(name, version)
                await served.close()
                slot.state = "END"
