"""What a search costs beside the model: its wall time against the scoring calls it is made of.

Three things are timed, over the same queries, in interleaved rounds:
    search      `SearchEngine.search`
    replay      the calls of the scorer that the search made, with the inputs it gathered, back to back
    one call    the same pairs in as few calls as the largest shape allows
The replay reads its inputs from copies of their own; reading them from one warm buffer, as the search does
after its gather, takes the same processor time (Brunch, batches of 1 and 16: medians within 1 %).
search / replay is the engine's overhead; replay / one call is what taking small steps costs.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.devices import cpu_lanes, threads_per_lane
from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.offline.benchmark.recording import RecordedSearch, RecordingScorer, ScoreCall
from nann.offline.progress import Progress

if TYPE_CHECKING:
    from jaxtyping import Float64

    from nann.engine.artifacts import Verify

__all__ = ["Overhead", "Saturation", "load_recording_engine", "measure_overhead"]


@dataclass(frozen=True, slots=True)
class Saturation:
    """How many lanes search at a time, and how many queries share a search."""

    lanes: int
    batch: int

    @property
    def name(self) -> str:
        if (self.lanes, self.batch) == (1, 1):
            return "one request in flight"
        return f"saturation, {self.lanes} lanes × {self.batch} queries"


@dataclass(frozen=True, slots=True)
class Overhead:
    """Times are wall time on a lane for one search of `batch` queries [ms]: of each search its median over
    the rounds, then the mean over the searches.

    `replay_ms` and `one_call_ms` include `encode_ms`, the user part of the model. `overhead` = search /
    replay, `small_steps` = replay / one call; `overhead_cpu` is search / replay in processor time of the
    whole process, which other processes disturb less. `padding` is the share of the rows given to the
    model that no query wanted. `phases` are shares of a search's time. `rounds` has the means of each.
    """

    lanes: int
    batch: int
    searches: int
    search_ms: float
    replay_ms: float
    encode_ms: float
    one_call_ms: float
    overhead: float
    overhead_without_encode: float
    overhead_cpu: float
    small_steps: float
    padding: float
    padding_in_one_call: float
    calls_per_search: float
    calls_at_once_per_search: float
    items_scored_per_query: float
    phases: dict[str, float]
    rounds: tuple[dict[str, float], ...]


def load_recording_engine(
    version_dir: Path,
    *,
    lanes: int,
    max_batch: int,
    max_k: int,
    verify: Verify,
    xla_cache_dir: Path | None,
    intra_op_threads: int | None,
) -> tuple[SearchEngine, RecordingScorer]:
    """As `SearchEngine.load`, with a scorer that can record. Raises what that raises."""
    from nann.engine.artifacts import Artifact
    from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

    artifact = Artifact.open(version_dir, verify=verify)
    scorer = RecordingScorer(
        TensorFlowScorer(
            version_dir,
            artifact.manifest,
            max_batch=max_batch,
            xla_cache_dir=xla_cache_dir,
            intra_op_threads=threads_per_lane(lanes) if intra_op_threads is None else intra_op_threads,
        )
    )
    opened = cpu_lanes(artifact, [scorer] * lanes, max_batch=max_batch)
    return SearchEngine(artifact, opened, max_batch=max_batch, max_k=max_k), scorer


def measure_overhead(
    engine: SearchEngine,
    scorer: RecordingScorer,
    batches: Sequence[Sequence[PreparedQuery]],
    saturation: Saturation,
    *,
    rounds: int,
    progress: Progress | None = None,
) -> Overhead:
    """Measure one saturation of a warmed-up `engine` built over `scorer`, with these batches a round.

    Raises:
        ValueError: a batch is not of the saturation's size, the engine has fewer lanes, or no round.
    """
    if rounds < 1 or not batches or any(len(batch) != saturation.batch for batch in batches):
        raise ValueError(f"give at least one round, and batches of {saturation.batch} queries")
    if saturation.lanes > engine.n_lanes:
        raise ValueError(f"the engine has {engine.n_lanes} lanes, not {saturation.lanes}")
    progress = progress or Progress(silent=True)
    recorded = [_record(engine, scorer, batch) for batch in batches]
    at_once = [record.in_one_call(scorer.grid) for record in recorded]
    works: Mapping[str, Callable[[int, int], object]] = {
        "search": lambda lane, i: engine.search(batches[i], lane),
        "replay": lambda _lane, i: recorded[i].replay(scorer),
        "encode": lambda _lane, i: recorded[i].encode(scorer),
        "one_call": lambda _lane, i: _score(scorer, recorded[i], at_once[i]),
    }
    wall_s: dict[str, list[np.ndarray]] = {name: [] for name in works}
    cpu_s: dict[str, list[float]] = {name: [] for name in works}
    with progress.stage(saturation.name, total=rounds + 1, unit="rounds") as stage:
        for number in range(rounds + 1):
            for name in sorted(works, reverse=bool(number % 2)):
                wall, cpu = _timed(works[name], len(batches), saturation.lanes)
                if number:  # the first round warms caches
                    wall_s[name].append(wall)
                    cpu_s[name].append(cpu)
            stage.advance()
    ms = {name: 1e3 * float(np.median(of_rounds, axis=0).mean()) for name, of_rounds in wall_s.items()}
    pairs = sum(record.real_pairs for record in recorded)
    n_calls = [sum(len(calls) for calls in some) for some in ([r.calls for r in recorded], at_once)]
    return Overhead(
        lanes=saturation.lanes,
        batch=saturation.batch,
        searches=len(batches),
        **{f"{name}_ms": value for name, value in ms.items()},
        overhead=ms["search"] / ms["replay"],
        overhead_without_encode=(ms["search"] - ms["encode"]) / (ms["replay"] - ms["encode"]),
        overhead_cpu=statistics.median(cpu_s["search"]) / statistics.median(cpu_s["replay"]),
        small_steps=ms["replay"] / ms["one_call"],
        padding=1 - pairs / max(sum(record.scored_rows for record in recorded), 1),
        padding_in_one_call=1 - pairs / max(sum(c.plan.shape.pairs for calls in at_once for c in calls), 1),
        calls_per_search=n_calls[0] / len(batches),
        calls_at_once_per_search=n_calls[1] / len(batches),
        items_scored_per_query=pairs / (len(batches) * saturation.batch),
        phases=_phases(engine, batches, saturation.lanes),
        rounds=tuple(
            {f"{name}_ms": 1e3 * float(wall_s[name][number].mean()) for name in works}
            for number in range(rounds)
        ),
    )


def _record(engine: SearchEngine, scorer: RecordingScorer, batch: Sequence[PreparedQuery]) -> RecordedSearch:
    scorer.start()
    engine.search(batch, 0)
    return scorer.stop()


def _score(scorer: RecordingScorer, recorded: RecordedSearch, calls: Sequence[ScoreCall]) -> None:
    users = recorded.encode(scorer)
    for call in calls:
        scorer.score(users, call.tiles)


def _timed(
    work: Callable[[int, int], object], n_works: int, lanes: int
) -> tuple[Float64[np.ndarray, " n"], float]:
    """Do ``work(lane, 0 … n_works - 1)``, `lanes` of them at a time.

    Returns the seconds that each took, and those of processor time that all took.
    """
    numbers = iter(range(n_works))  # shared: whoever is free takes the next
    ready = threading.Barrier(lanes)
    wall_s = np.zeros(n_works)
    failures: list[BaseException] = []

    def run(lane: int) -> None:
        ready.wait()
        try:
            for number in numbers:
                started_s = time.perf_counter()
                work(lane, number)
                wall_s[number] = time.perf_counter() - started_s
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(lane,), daemon=True) for lane in range(lanes)]
    started_s = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return wall_s, time.process_time() - started_s


def _phases(engine: SearchEngine, batches: Sequence[Sequence[PreparedQuery]], lanes: int) -> dict[str, float]:
    """Share of the searches' time by phase, in the order the phases first end."""
    clocks = [_PhaseClock() for _ in range(lanes)]

    def search(lane: int, i: int) -> Any:
        clocks[lane].start()
        return engine.search(batches[i], lane, clocks[lane].end)

    _timed(search, len(batches), lanes)
    seconds: dict[str, float] = defaultdict(float)
    for clock in clocks:
        for phase, phase_s in clock.seconds.items():
            seconds[phase] += phase_s
    total_s = sum(seconds.values())
    return {phase: phase_s / total_s for phase, phase_s in seconds.items()}


class _PhaseClock:
    """Adds up the time between the ends of phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last_s = 0.0

    def start(self) -> None:
        self._last_s = time.perf_counter()

    def end(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.seconds[phase] += now_s - self._last_s
        self._last_s = now_s
