"""``nann benchmark --overhead``: what a search costs beside the model, at one request and at saturation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from nann.cli.benchmark_engine import engine_queries, find_version, in_words, serve_version
from nann.cli.benchmark_targets import Ask
from nann.cli.output import emit
from nann.cli.parameters import given
from nann.engine.devices import CPU, default_max_batch
from nann.engine.search_engine import PreparedQuery
from nann.offline.benchmark.machine import Machine
from nann.offline.benchmark.overhead import Saturation, load_recording_engine, measure_overhead
from nann.offline.benchmark.report import overhead_json, overhead_text
from nann.offline.benchmark.users import sample_users
from nann.offline.progress import Progress
from nann.service.settings import load_settings

__all__ = ["print_overhead"]


def print_overhead(
    repository: Path,
    ask: Ask,
    engine_flags: Mapping[str, Any],
    *,
    users: int,
    seed: int,
    rounds: int,
    searches: int,
    as_json: bool,
) -> None:
    """Measure one request in flight and full batches on all lanes, and print both.

    Raises:
        ValueError: the artifact has too few users.
    """
    machine = Machine.here()
    version_dir = find_version(repository, ask.model)
    settings = load_settings(repository=repository, **engine_flags)
    asked = sample_users(version_dir, limit=users, seed=seed)
    with Progress() as progress:
        with progress.stage("load and compile"):
            engine, scorer = load_recording_engine(
                version_dir,
                lanes=settings.lanes,
                max_batch=settings.max_batch_size or default_max_batch([CPU]),
                max_k=settings.max_k,
                verify=settings.verify,
                xla_cache_dir=settings.xla_cache_dir,
                intra_op_threads=settings.intra_op_threads,
            )
            engine.warm_up()

        async def prepare() -> list[PreparedQuery]:
            served = serve_version(engine, settings)
            queries = engine_queries(served, settings, ask, asked)
            await served.batcher.close()
            return [engine.check(query) for query in queries]

        prepared = uvloop.run(prepare())
        results = [
            measure_overhead(
                engine,
                scorer,
                _batches(prepared, load.batch, n),
                load,
                rounds=rounds,
                progress=progress,
            )
            for load, n in (
                (Saturation(1, 1), searches),
                # A full batch takes about as long as its queries one by one: two for each lane will do.
                (Saturation(engine.n_lanes, engine.max_batch), 2 * engine.n_lanes),
            )
        ]
    workload = {"users": users, "seed": seed, **given(asdict(ask)), **in_words(settings, engine)}
    emit(
        overhead_json(results, machine, workload),
        as_json=as_json,
        words=overhead_text(results, machine, workload),
    )


def _batches(prepared: Sequence[PreparedQuery], size: int, count: int) -> list[list[PreparedQuery]]:
    """The first `count` batches of `size` queries that may share one, in the users' order."""
    groups: dict[Any, list[PreparedQuery]] = {}
    batches = []
    for query in prepared:
        group = groups.setdefault(query.compat, [])
        group.append(query)
        if len(group) == size:
            batches.append(groups.pop(query.compat))
        if len(batches) == count:
            return batches
    raise ValueError(f"too few users for {count} batches of {size}: raise --users or lower --searches")
