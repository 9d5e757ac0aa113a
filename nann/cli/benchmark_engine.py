"""The engine in this process as a benchmark's target: batcher and settings of the service, no transport."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nann.cli.benchmark_targets import Ask
from nann.engine.errors import RetrievalError
from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.engine.types import Hits, Query
from nann.offline.benchmark.load import Outcome, Target
from nann.offline.benchmark.users import User
from nann.service.batcher import Batcher
from nann.service.errors import error_row
from nann.service.params import result_size, search_params
from nann.service.registry import ServedVersion, find_newest_versions
from nann.service.served_version import batcher_limits
from nann.service.settings import Settings
from nann.service.types import ParamOverrides

__all__ = ["engine_queries", "find_version", "in_process", "in_words", "serve_version"]


class _EngineTarget:
    def __init__(
        self,
        engine: SearchEngine,
        batcher: Batcher[PreparedQuery, Hits],
        queries: Sequence[Query],
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._batcher = batcher
        self._queries = queries
        self._timeout_s = timeout_s

    async def send(self, i: int) -> Outcome:
        try:
            prepared = self._engine.check(self._queries[i % len(self._queries)])
            answer = await self._batcher.submit(prepared, deadline_s=time.monotonic() + self._timeout_s)
        except RetrievalError as error:
            return Outcome(error_row(error).code)
        return Outcome(
            service_s=answer.search_s,
            queue_s=answer.queue_s,
            n_scored=answer.result.n_scored,
            batch_size=answer.batch_size,
        )


@asynccontextmanager
async def in_process(
    engine: SearchEngine, settings: Settings, ask: Ask, users: Sequence[User], *, timeout_s: float
) -> AsyncIterator[Target]:
    """A warmed-up engine behind the service's batcher, without transport, on this event loop."""
    served = serve_version(engine, settings)
    # As the server does when it is ready: no collection then walks through the model.
    gc.collect()
    gc.freeze()
    try:
        yield _EngineTarget(engine, served.batcher, engine_queries(served, settings, ask, users), timeout_s)
    finally:
        await served.batcher.close()


def serve_version(engine: SearchEngine, settings: Settings) -> ServedVersion:
    """The engine as the server would serve it: its profiles, and a batcher of the settings' limits."""
    manifest = engine.manifest
    batcher: Batcher[PreparedQuery, Hits] = Batcher(engine.search, batcher_limits(settings, engine))
    return ServedVersion(manifest.model_name, manifest.version, engine, batcher, settings.default_profile)


def engine_queries(served: ServedVersion, settings: Settings, ask: Ask, users: Sequence[User]) -> list[Query]:
    """The queries that the service would make of these users' requests.

    Raises:
        InvalidQuery: a parameter is out of range.
        ValueError: a user has no history here.
    """

    params = search_params(
        ParamOverrides(**ask.params) if ask.params else None,
        ask.profile,
        profiles=served.profiles,
        default=served.default_params,
        settings=settings,
    )
    k = result_size(ask.k, params, max_k=settings.max_k)
    exclude_seen = settings.exclude_seen_default if ask.exclude_seen is None else ask.exclude_seen
    queries = []
    for user in users:
        history = user.history
        if history is None and user.user_id is not None:
            history = served.engine.user_history(user.user_id)
        if not history:
            raise ValueError(f"user {user.user_id!r} has no history in this artifact")
        queries.append(
            Query(
                k=k,
                params=params,
                history=history,
                seen=history if exclude_seen else (),
                with_attributes=ask.with_attributes,
            )
        )
    return queries


def find_version(path: Path, model: str | None) -> Path:
    """The version that a path means: one itself, a run's index, or the newest of a model repository.

    Raises:
        ArtifactError: none of them is there.
        ValueError: the repository has several models and none is named.
    """

    for directory in (path, path / "index"):
        if (directory / "manifest.json").is_file():
            return directory
    newest = find_newest_versions(path, model)
    if len(newest) > 1:
        raise ValueError(f"name one of the models {', '.join(newest)} by --model")
    ((_version, directory),) = newest.values()
    return directory


def in_words(settings: Settings, engine: SearchEngine) -> dict[str, Any]:
    """The artifact and the settings that decide how fast an engine in process is."""
    manifest = engine.manifest
    return {
        "model": manifest.model_name,
        "version": manifest.version,
        "items": manifest.num_items,
        "lanes": engine.n_lanes,
        "max_batch_size": engine.max_batch,
        "batch_wait_ms": settings.batch_wait_ms,
        "intra_op_threads": settings.intra_op_threads,
    }
