"""A published version loaded as a server loads it: time by phase, memory, searches and what they find."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.artifacts import Artifact
from nann.engine.devices import cpu_lanes, threads_per_lane
from nann.engine.recall import recall_at_k
from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.engine.types import Hits, Query, SearchParams
from nann.offline.benchmark.growth.opening import forget_files
from nann.offline.benchmark.growth.timing import measured

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["EFS", "K", "measure_loading", "measure_searching"]

K = 200
EFS = (200, 400, 800, 1600, 3200)
_BEAM_WIDTH = 64  # of the served profiles
_LANES = 2  # the server's default
_MAX_BATCH = 16
_ROUNDS = 3


def measure_loading(version: Path, *, cold: bool) -> dict[str, Any]:
    """Seconds of the parts that `SearchEngine.load` consists of, one after the other.

    `cold` drops the version from the page cache first. For a fresh process: the first load imports and
    compiles.
    """
    from nann.engine.scoring.pjrt_programs import open_programs
    from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer

    if cold:
        forget_files(version)
    figures: dict[str, Any] = {}
    with measured(figures, "open"):
        artifact = Artifact.open(version, verify="fast")
    with measured(figures, "scorer"):
        programs = open_programs(
            version,
            artifact.manifest,
            platform="cpu",
            max_batch=_MAX_BATCH,
            intra_op_threads=threads_per_lane(_LANES),
        )
        scorers = [PjrtScorer(programs, HostHandover(programs.device)) for _ in range(_LANES)]
    with measured(figures, "tables"):
        lanes = cpu_lanes(artifact, scorers, max_batch=_MAX_BATCH)
    with measured(figures, "catalog"):
        SearchEngine(artifact, lanes, max_batch=_MAX_BATCH)
    return figures


def measure_searching(version: Path, *, users: int) -> dict[str, Any]:
    """Load, memory, and searches for `users` users: best-first at every one of `EFS`, and exhaustive."""
    figures: dict[str, Any] = {"before": _memory()}
    with measured(figures, "load"):
        engine = SearchEngine.load(version, lanes=_LANES, max_batch=_MAX_BATCH, verify="fast", scorer="pjrt")
    figures["loaded"] = _memory()
    with measured(figures, "warm_up"):
        engine.warm_up()
    figures["warm"] = _memory()
    gc.collect()
    gc.freeze()  # as a server does once it is ready
    exact = _ask_on_all_lanes(engine, _prepare(engine, users, SearchParams(policy="exhaustive")), figures)
    figures["table_bytes"] = engine.memory_bytes
    figures["searches"] = [_search(engine, users, ef, exact) for ef in EFS]
    figures["searched"] = _memory()
    return figures


def _prepare(engine: SearchEngine, users: int, params: SearchParams) -> list[PreparedQuery]:
    """One query for each of the first `users` user ids, with the history that the version knows of them."""
    histories = [engine.user_history(user) or () for user in range(1, users + 1)]
    return [engine.check(Query(k=K, params=params, history=history)) for history in histories]


def _search(
    engine: SearchEngine, users: int, ef: int, exact: Float64[np.ndarray, "users k"]
) -> dict[str, Any]:
    params = SearchParams(policy="best_first", ef=ef, beam_width=_BEAM_WIDTH)
    queries = _prepare(engine, users, params)
    hits: list[Hits] = []
    latency_s = []
    cpu = time.process_time()
    for _ in range(_ROUNDS):
        hits = []
        for query in queries:
            started = time.perf_counter()
            hits += engine.search([query], 0)
            latency_s.append(time.perf_counter() - started)
    cpu_s = (time.process_time() - cpu) / len(latency_s)
    recall = recall_at_k(_scores(hits), exact, K)
    percentiles = np.percentile(latency_s, (50, 95)) * 1000
    return {
        "ef": ef,
        "recall": float(recall.mean()),
        "recall_p5": float(np.percentile(recall, 5)),
        "items_scored": float(np.mean([answer.n_scored for answer in hits])),
        "steps": float(np.mean([answer.steps for answer in hits])),
        "p50_ms": float(percentiles[0]),
        "p95_ms": float(percentiles[1]),
        "cpu_ms": 1000 * cpu_s,
    }


def _ask_on_all_lanes(
    engine: SearchEngine, queries: Sequence[PreparedQuery], figures: dict[str, Any]
) -> Float64[np.ndarray, "users k"]:
    """Scores of the answers, in the order of the queries; `figures` gets the time of all of them."""

    def run(lane: int) -> list[Hits]:
        return [engine.search([query], lane)[0] for query in queries[lane :: engine.n_lanes]]

    with measured(figures, "exhaustive"), ThreadPoolExecutor(engine.n_lanes) as pool:
        by_lane = list(pool.map(run, range(engine.n_lanes)))
    return _scores([by_lane[row % engine.n_lanes][row // engine.n_lanes] for row in range(len(queries))])


def _scores(hits: Sequence[Hits]) -> Float64[np.ndarray, "users k"]:
    scores = np.full((len(hits), K), -np.inf)
    for row, answer in enumerate(hits):
        scores[row, : len(answer.scores)] = answer.scores
    return scores


def _memory() -> dict[str, int]:
    """Bytes of this process in memory: its own (anonymous), of mapped files, and its own at the highest."""
    names = {"RssAnon": "anonymous_bytes", "RssFile": "mapped_bytes", "VmHWM": "peak_bytes"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found
