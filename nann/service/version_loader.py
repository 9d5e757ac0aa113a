"""Loading one version: on a thread of low priority, if there is room for it, warmed by all it brings."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from nann.engine.artifacts import read_manifest, verify_files
from nann.engine.devices import CPU, choose_devices, choose_scorer, default_max_batch
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.footprint import expected_load_bytes
from nann.service.allocator import give_back_free_memory
from nann.service.errors import NotEnoughMemory
from nann.service.headroom import available_bytes, check_headroom
from nann.service.lane import Lane
from nann.service.logs import get_logger
from nann.service.recorded_requests import replay_recorded
from nann.service.search_process.lanes import PROCESS_BYTES, Starter
from nann.service.settings import Settings

if TYPE_CHECKING:
    from nann.engine.search_engine import SearchEngine
    from nann.service.search_process.lanes import ProcessLanes

__all__ = ["LoadEngine", "VersionLoader", "engine_loader"]

LoadEngine = Callable[[Path], "SearchEngine"]

# Of the thread that loads: whether versions serve meanwhile.
_beside_others: ContextVar[bool] = ContextVar("beside_others", default=False)
# Half of the way to the lowest priority: a tenth of a processor that searches want, all of an idle one.
_NICENESS: Final = 10

T = TypeVar("T")

log = get_logger(__name__)


class VersionLoader:
    """Loads one version at a time, on a thread, for an event loop."""

    def __init__(
        self,
        settings: Settings,
        load_engine: LoadEngine | None = None,
        *,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        self._settings = settings
        self._load_engine = load_engine or engine_loader(settings)
        self._available = available
        self._lanes: set[Lane] = set()

    @property
    def busy(self) -> bool:
        """True while a thread loads or frees a version (it cannot be interrupted)."""
        return any(lane.busy for lane in self._lanes)

    async def load(self, version_dir: Path, *, beside_others: bool) -> tuple[SearchEngine, float]:
        """A warm engine, and the seconds it took; `beside_others` when versions serve meanwhile.

        Raises:
            ArtifactError: the version is damaged, or is no version.
            NotEnoughMemory: it would not fit beside the others.
            BackendError, Unsupported: its warm-up failed.
        """

        def load() -> SearchEngine:
            _beside_others.set(beside_others)
            self._look_for_room(version_dir, refuse=beside_others)
            engine = self._load_engine(version_dir)
            with _closed_on_failure(engine):
                replayed = replay_recorded(engine, version_dir, self._settings)
            if replayed:
                log.info("replayed recorded requests", model=version_dir.parent.name, requests=replayed)
            return engine

        started_s = time.monotonic()
        return await self._call(load), time.monotonic() - started_s

    async def verify(self, version_dir: Path) -> None:
        """Check the files of a version before another one makes room for it; raises ArtifactError."""

        def verify() -> None:
            _give_way()
            verify_files(version_dir, read_manifest(version_dir), self._settings.verify)

        await self._call(verify)

    async def free(self, let_go: Callable[[], None]) -> None:
        """Run `let_go`, which drops the last references to a version, on a thread of low priority."""

        def free() -> None:
            _give_way()
            let_go()
            give_back_free_memory()

        await self._call(free)

    async def _call(self, work: Callable[[], T]) -> T:
        self._lanes = {lane for lane in self._lanes if lane.busy}  # one that nobody awaits any more
        lane = Lane("nann-load")
        self._lanes.add(lane)
        try:
            return await lane.call(work)
        finally:
            lane.close()

    def _look_for_room(self, version_dir: Path, *, refuse: bool) -> None:
        if not self._settings.check_memory:
            return
        try:
            manifest = read_manifest(version_dir)
        except ArtifactError:
            return  # the load itself says it, with all it has to say
        devices, _reason = choose_devices(self._settings.device, scorer=self._settings.scorer)
        max_batch = self._settings.max_batch_size or default_max_batch(devices)
        needed = expected_load_bytes(manifest, lanes=self._settings.lanes, max_batch=max_batch)
        try:
            if self._settings.search_process and devices == (CPU,):
                needed += PROCESS_BYTES[choose_scorer(self._settings.scorer, devices, manifest, max_batch)]
            check_headroom(needed, self._available())
        except NotEnoughMemory as error:
            if refuse:
                raise
            # With nothing to protect, an estimate is no reason not to try.
            log.warning("memory may not suffice", model=version_dir.parent.name, reason=str(error))


def _give_way() -> None:
    """Lower the priority of this thread, and of those that it starts (Linux; elsewhere a thread has none)."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@contextmanager
def _closed_on_failure(opened: SearchEngine | ProcessLanes) -> Iterator[None]:
    """Close what is open if the block fails: it may have a process, which should not wait for a collector."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


def engine_loader(settings: Settings) -> LoadEngine:
    """What loads and warms one version as `settings` say; blocking, and the first to import heavy libraries.

    Under ``--device auto`` a version that a GPU will not load or warm is served from the CPU, with a
    warning; a device that was named is never left.
    """

    chosen: set[Path] = set()  # models of which the device chosen has served a version
    starter = Starter() if settings.search_process else None

    def load(version_dir: Path) -> SearchEngine:
        model_dir = version_dir.parent
        try:
            engine = _load(version_dir, settings, settings.device, starter)
            chosen.add(model_dir)
            return engine
        except (BackendError, Unsupported) as error:
            # That a new version does not fit beside the old one is no reason to be slow from now on.
            if model_dir in chosen or not _chose_gpu(settings):
                raise
            log.warning("not served as --device auto chose, but on the CPU", reason=str(error))
        # Out of the handler, so that the error does not keep the failed engine's memory alive.
        return _load(version_dir, settings, "cpu", starter)

    return load


def _chose_gpu(settings: Settings) -> bool:
    """Whether ``--device auto`` was written and means a GPU here."""
    from nann.engine.devices import choose_devices

    if settings.device != "auto":
        return False
    devices, _reason = choose_devices("auto", scorer=settings.scorer)
    return devices[0].kind == "cuda"


def _writable(directory: Path) -> Path | None:
    """`directory`, made if need be; None, with a warning, where it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        log.warning(
            "no cache of compiled programs: the next start compiles again",
            directory=str(directory),
            error=error.strerror,
        )
        return None


def _load(version_dir: Path, settings: Settings, device: str, starter: Starter | None) -> SearchEngine:
    engine = _open(version_dir, settings, device, starter)
    log.info("device", model=engine.manifest.model_name, chosen=engine.placement)
    with _closed_on_failure(engine):
        bit_equal = engine.warm_up().bit_equal
    if not bit_equal:
        log.warning(
            "scores depend on the shape they are computed in: equal queries may get unequal answers",
            model=engine.manifest.model_name,
        )
    return engine


def _open(version_dir: Path, settings: Settings, device: str, starter: Starter | None) -> SearchEngine:
    from nann.engine.devices import DeviceMemory, parse_memory_limit
    from nann.engine.search_engine import SearchEngine

    if starter is not None and not device.startswith("cuda"):
        devices, reason = choose_devices(device, scorer=settings.scorer)
        if devices == (CPU,):
            # The process gives way. What is left to do here keeps the interpreter, which somebody waits for.
            return _open_apart(version_dir, settings, reason, starter)
    if _beside_others.get():
        _give_way()
    limit = settings.device_memory_limit
    return SearchEngine.load(
        version_dir,
        device=device,
        scorer=settings.scorer,
        precision=settings.score_precision,
        lanes=settings.lanes,
        max_batch=settings.max_batch_size,
        verify=settings.verify,
        xla_cache_dir=_writable(settings.xla_cache_dir),
        kernel_cache_dir=_writable(settings.kernel_cache_dir),
        max_k=settings.max_k,
        intra_op_threads=settings.intra_op_threads,
        memory=DeviceMemory(
            None if limit is None else parse_memory_limit(limit), settings.xla_memory_fraction
        ),
    )


def _open_apart(version_dir: Path, settings: Settings, reason: str, starter: Starter) -> SearchEngine:
    """An engine whose lanes are in a process of their own, on the CPU."""
    from nann.engine.artifacts import Artifact
    from nann.engine.devices import threads_per_lane
    from nann.engine.search_engine import SearchEngine
    from nann.service.search_process.lanes import ProcessLanes
    from nann.service.search_process.messages import OpenLanes

    max_batch = settings.max_batch_size or default_max_batch((CPU,))
    scorer = choose_scorer(settings.scorer, (CPU,), read_manifest(version_dir), max_batch)
    # It verifies the version, too: there the time of a processor that this takes is nobody else's.
    lanes = ProcessLanes(
        OpenLanes(
            version_dir=version_dir,
            verify=settings.verify,
            scorer=scorer,
            lanes=settings.lanes,
            max_batch=max_batch,
            xla_cache_dir=_writable(settings.xla_cache_dir),
            intra_op_threads=settings.intra_op_threads or threads_per_lane(settings.lanes),
            precision=settings.score_precision,
            gives_way=_beside_others.get(),
        ),
        starter,
        search_timeout_s=settings.search_timeout_s or None,
    )
    with _closed_on_failure(lanes):
        return SearchEngine(
            Artifact.open(version_dir, verify="fast"),
            lanes,
            max_batch=max_batch,
            max_k=settings.max_k,
            placement=f"{reason}; scorer {scorer}, in a process of its own",
        )
