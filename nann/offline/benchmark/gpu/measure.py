"""Measurements of one engine on one lane: what its settings find, what they cost, and where time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.gpu.plan import Deadline
from nann.offline.benchmark.gpu.quality import Ranked, recall

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["Bench", "Found", "K", "Setting", "as_rows", "profile", "try_settings"]

K = 200  # the answers of NANN's published figures (reference/nann.md)


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to search, and what to call it."""

    name: str
    params: SearchParams


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine that has been warmed up, and what can be asked of its device.

    `synchronize` waits for lane 0's device work; `launches` counts the engine's own kernels so far and
    `growths` the scratch buffers that had to grow, on all lanes.
    """

    engine: SearchEngine
    histories: Int32[np.ndarray, "users length"]
    batch: int
    synchronize: Callable[[], None]
    launches: Callable[[], int]
    growths: Callable[[], int]

    def prepare(self, params: SearchParams, users: int | None = None) -> list[PreparedQuery]:
        """The queries of the first `users` users (all by default)."""
        return [self.engine.check(query) for query in self.queries(params)[:users]]

    def queries(self, params: SearchParams) -> list[Query]:
        """What every user asks, unchecked."""
        return [Query(K, params, history=row[row >= 0].tolist()) for row in self.histories]


@dataclass(frozen=True, slots=True)
class Found:
    """What one setting found, batch after batch on one lane; times are of whole searches.

    `launches_a_search` counts the engine's own kernels, `programs_a_search` calls of XLA's programs.
    """

    name: str
    recall: float | None
    recall_p5: float | None
    mean_items_scored: float
    steps: float
    ms_a_batch: float
    qps: float
    pairs_per_s: float
    launches_a_search: float
    programs_a_search: float
    users: int
    batch: int


def try_settings(
    bench: Bench,
    settings: Sequence[Setting],
    exact: Ranked | None,
    deadline: Deadline,
    *,
    users: int,
) -> tuple[list[Found], dict[str, Any]]:
    """Each setting over the first `users` users, the first of them in any case; and their answers by name."""
    found: list[Found] = []
    answers: dict[str, Any] = {}
    last_s = 0.0
    for setting in settings:
        if found and not deadline.allows(setting.name, 1.5 * last_s):
            continue
        started_s = time.perf_counter()
        one, hits = _try(bench, setting, exact, users)
        last_s = time.perf_counter() - started_s
        found.append(one)
        answers[setting.name] = hits
    return found, answers


def _try(bench: Bench, setting: Setting, exact: Ranked | None, users: int) -> tuple[Found, list[Any]]:
    prepared = bench.prepare(setting.params, users)
    batches = [prepared[start : start + bench.batch] for start in range(0, len(prepared), bench.batch)]
    programs = 0

    def count_programs(phase: str) -> None:
        nonlocal programs
        programs += phase in ("encode", "score")

    bench.engine.search(batches[0], 0, count_programs)  # buffers grow here, and are not timed
    launches, hits, seconds = bench.launches(), [], []
    programs = 0
    for batch in batches:
        started_s = time.perf_counter()
        hits += bench.engine.search(batch, 0, count_programs)
        seconds.append(time.perf_counter() - started_s)
    scored = np.array([one.n_scored for one in hits])
    shares = None if exact is None else recall(Ranked.of(hits, K), exact.some(slice(len(hits))))
    total_s = sum(seconds)
    return (
        Found(
            name=setting.name,
            recall=None if shares is None else float(shares.mean()),
            recall_p5=None if shares is None else float(np.percentile(shares, 5)),
            mean_items_scored=float(scored.mean()),
            steps=float(np.mean([one.steps for one in hits])),
            ms_a_batch=1e3 * float(np.median(seconds)),
            qps=len(hits) / total_s,
            pairs_per_s=float(scored.sum()) / total_s,
            launches_a_search=(bench.launches() - launches) / len(batches),
            programs_a_search=programs / len(batches),
            users=len(hits),
            batch=len(batches[0]),
        ),
        hits,
    )


def profile(bench: Bench, setting: Setting, deadline: Deadline, *, repeats: int) -> dict[str, Any]:
    """Milliseconds of each phase of a search, with the device waited for at the end of each phase.

    The waiting itself costs: `total_ms` is with it, `plain_ms` is the same search without.
    """
    batch = bench.prepare(setting.params, bench.batch)
    totals: dict[str, float] = {}
    plain: list[float] = []
    probed: list[float] = []
    for _ in range(repeats):
        if not deadline.allows(f"repeats of {setting.name}"):
            break
        started_s = time.perf_counter()
        bench.engine.search(batch, 0)
        plain.append(time.perf_counter() - started_s)
        last_s = started_s = time.perf_counter()

        def at(phase: str) -> None:
            nonlocal last_s
            bench.synchronize()
            now_s = time.perf_counter()
            totals[phase] = totals.get(phase, 0.0) + now_s - last_s
            last_s = now_s

        bench.engine.search(batch, 0, at)
        probed.append(time.perf_counter() - started_s)
    if not plain:
        return {}
    return {
        "setting": setting.name,
        "batch": len(batch),
        "plain_ms": 1e3 * float(np.median(plain)),
        "total_ms": 1e3 * float(np.mean(probed)),
        "phases_ms": {name: 1e3 * seconds / len(probed) for name, seconds in totals.items()},
    }


def as_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """For the report's JSON."""
    return [asdict(one) for one in found]
