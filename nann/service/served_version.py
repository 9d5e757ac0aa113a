"""One loaded version, with what it takes to serve it. It goes away when its last user has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from nann.engine.errors import ArtifactError
from nann.engine.types import SearchParams
from nann.service.batcher import Batcher, BatcherLimits
from nann.service.settings import Settings, SettingsError
from nann.service.types import ModelMetadata

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery, SearchEngine
    from nann.engine.types import Hits

__all__ = ["ServedVersion", "batcher_limits", "profiles_of"]

_USUAL_PROFILE = "balanced"
_SEVERAL: Final = ("level_topn", "level_ef")  # parameters of several numbers: arrays in JSON
# Some 80 ms of a processor's time, and 10 to 20 ms of a GPU's at the rates of reference/gpu.md.
_CPU_BATCH_WORK = 100_000
_GPU_BATCH_WORK = 2_000_000


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
        self.profiles = profiles_of(engine)
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

    async def close(self, run: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Wait for the last lease, finish what is queued, free the engine through `run`. No lease may follow.

        Giving tables of gigabytes back takes the kernel a while, so `run` calls on a thread; the engine
        must have no other user by then, because whoever drops the last reference pays.
        """
        while self._leases:
            self._unused.clear()
            await self._unused.wait()
        await self.batcher.close()
        last = [self.engine]
        del self.engine, self.batcher
        await asyncio.sleep(0)  # callbacks of the batcher that are on their way refer to it

        def free() -> None:
            last.pop().close()

        await run(free)

    def _default_params(self, default_profile: str | None) -> SearchParams:
        if default_profile is None:
            return self.profiles.get(_USUAL_PROFILE, SearchParams())
        if default_profile not in self.profiles:
            raise SettingsError(
                f"--default-profile {default_profile}: {self.name} version {self.version} has only "
                + ", ".join(sorted(self.profiles))
            )
        return self.profiles[default_profile]


def profiles_of(engine: SearchEngine) -> dict[str, SearchParams]:
    """The search profiles that a version brings, by name; raises ArtifactError for fields nobody knows."""
    profiles: Mapping[str, Mapping[str, Any]] = engine.profiles
    try:
        return {
            name: SearchParams(**{**fields, **{n: tuple(fields[n]) for n in _SEVERAL if n in fields}})
            for name, fields in profiles.items()
        }
    except TypeError as error:
        raise ArtifactError(
            "manifest.json", expected="profiles of SearchParams fields", found=str(error)
        ) from None


def batcher_limits(settings: Settings, engine: SearchEngine) -> BatcherLimits:
    """The sizes of the batcher in front of an engine."""
    on_gpu = any(device.startswith("cuda") for device in engine.lane_devices)
    return BatcherLimits(
        n_lanes=engine.n_lanes,
        max_batch=engine.max_batch,
        queue_limit=settings.queue_limit,
        queue_work_limit=settings.queue_work_limit,
        batch_work_limit=settings.max_batch_work or (_GPU_BATCH_WORK if on_gpu else _CPU_BATCH_WORK),
        batch_wait_s=settings.batch_wait_ms / 1e3,
        lane_groups=engine.lane_devices,
        lane_depth=engine.lane_depth,
    )
