"""`nann tune`: which settings of the search are worth trying, and which of them become the profiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nann.engine.search_engine import SearchEngine
from nann.engine.types import SearchParams
from nann.offline.data.dataset import Dataset
from nann.offline.progress import Progress
from nann.offline.search_quality import EvalUsers, Setting, answer_users, exhaustive_answers, summarise

__all__ = ["PROFILE_TARGETS", "Target", "choose_profiles", "pareto_front", "tune", "tuned_profiles", "walks"]

TUNING_FILE = "tuning.json"

# (ef, beam width) over a decade of costs.
_PLAIN = ((100, 32), (200, 32), (200, 64), (300, 64), (400, 64), (600, 64), (800, 64), (1200, 128))
# (ef, beam width, gate width, gate margin), the front of a wider sweep (docs/research/search.md, "The gate").
_GATED = (
    (200, 64, 128, -0.2),
    (200, 64, 128, 0.0),
    (200, 64, 128, 0.2),
    (200, 64, 256, 0.2),
    (250, 64, 256, 0.4),
    (300, 64, 256, 0.55),
    (300, 128, 256, 0.55),
    (300, 128, 384, 0.55),
    (400, 128, 384, 0.75),
    (600, 128, 384, 1.1),
    (1000, 128, 512, 1.6),
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a profile is to reach: a mean recall at the least cost, or, with `latency_ms`, the best recall
    whose median latency of a query alone is at most that."""

    recall: float | None = None
    latency_ms: float | None = None


PROFILE_TARGETS: Mapping[str, Target] = {"fast": Target(recall=0.95), "balanced": Target(recall=0.985)}


def walks(k: int, *, gated: bool) -> list[Setting]:
    """The settings of `best_first` to measure for answers of k items."""
    plain = [SearchParams(ef=max(ef, k), beam_width=width) for ef, width in _PLAIN]
    with_gate = [
        SearchParams(ef=max(ef, k), beam_width=width, gate_width=gate, gate_margin=margin)
        for ef, width, gate, margin in _GATED
    ]
    chosen = dict.fromkeys([*plain, *(with_gate if gated else ())])
    return [Setting(_name(params), params) for params in chosen]


def _name(params: SearchParams) -> str:
    name = f"best_first ef {params.ef}, beam {params.beam_width}"
    return f"{name}, gate {params.gate_width} / {params.gate_margin:g}" if params.gate_width else name


def choose_profiles(
    tuned: Sequence[Mapping[str, Any]], targets: Mapping[str, Target]
) -> tuple[dict[str, dict[str, Any]], dict[str, bool]]:
    """For each target the best measured row (of `search_quality.summarise`), and whether it reaches it.

    A recall is reached at the least cost, and where nothing reaches it the row with the most recall is taken;
    likewise the fastest where nothing is fast enough. Beside them comes ``exact``, which scans.
    """
    profiles: dict[str, dict[str, Any]] = {}
    reached = {}
    for name, target in targets.items():
        row, reached[name] = _best(tuned, target)
        profiles[name] = {"policy": "best_first", **row["params"]}
    return {**profiles, "exact": {"policy": "exhaustive"}}, {**reached, "exact": True}


def _best(tuned: Sequence[Mapping[str, Any]], target: Target) -> tuple[Mapping[str, Any], bool]:
    if target.latency_ms is not None:
        fast = [row for row in tuned if row["latency_ms"]["p50"] <= target.latency_ms]
        if fast:
            return max(fast, key=lambda row: row["recall"]), True
        return min(tuned, key=lambda row: row["latency_ms"]["p50"]), False
    good = [row for row in tuned if target.recall is None or row["recall"] >= target.recall]
    if good:
        return min(good, key=lambda row: row["cost"]), True
    return max(tuned, key=lambda row: row["recall"]), False


def pareto_front(rows: Sequence[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    """The rows that no other beats in both recall and `by` ("cost", "latency_ms"), cheapest first."""

    def price(row: Mapping[str, Any]) -> float:
        return float(row["latency_ms"]["p50"] if by == "latency_ms" else row[by])

    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (price(row), -row["recall"])):
        if not front or row["recall"] > front[-1]["recall"]:
            front.append(row)
    return front


def tune(
    run_dir: Path,
    *,
    targets: Mapping[str, Target] = PROFILE_TARGETS,
    k: int = 200,
    users: int = 300,
    seed: int = 0,
    xla_cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the settings on validation users of RUN/data, one query at a time, and choose RUN's profiles.

    Writes ``profiles.json``, which `export` publishes, and ``tuning.json`` with every row, the fronts and
    what was chosen; `evaluate` reports these profiles instead of choosing its own, as long as the index is
    the one that was tuned.

    Raises:
        ArtifactError, NotPreparedError: the run directory lacks a step's output, or it is damaged.
        ValueError: the data has no validation user.
    """
    progress = progress if progress is not None else Progress(silent=True)
    dataset = Dataset.load(run_dir / "data")
    with progress.stage("load and compile"):
        engine = open_for_measuring(run_dir / "index", lanes=2, k=k, xla_cache_dir=xla_cache_dir)
    k = min(k, dataset.num_items)
    chosen_from = EvalUsers.of(dataset, "validation", limit=users, seed=seed)
    truth = exhaustive_answers(engine, chosen_from, k=k, progress=progress)
    rows = [
        summarise(
            answer_users(engine, chosen_from, setting, k=k, progress=progress),
            chosen_from,
            truth,
            k=k,
            num_items=dataset.num_items,
            seed=seed,
        )
        for setting in walks(k, gated=engine.manifest.gate is not None)
    ]
    engine.close()
    profiles, reached = choose_profiles(rows, targets)
    report = {
        "index": _fingerprint(engine),
        "k": k,
        "n_users": len(chosen_from),
        "targets": {name: asdict(target) for name, target in targets.items()},
        "profiles": profiles,
        "reached": reached,
        "front": {by: [row["name"] for row in pareto_front(rows, by)] for by in ("cost", "latency_ms")},
        "rows": rows,
    }
    for name, content in (("profiles.json", profiles), (TUNING_FILE, report)):
        (run_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


def tuned_profiles(
    run_dir: Path, engine: SearchEngine
) -> tuple[dict[str, dict[str, Any]], dict[str, bool]] | None:
    """What `tune` chose for this very index, and which targets were reached; None when it did not."""
    path = run_dir / TUNING_FILE
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return (report["profiles"], report["reached"]) if report["index"] == _fingerprint(engine) else None


def open_for_measuring(index: Path, *, lanes: int, k: int, xla_cache_dir: Path | None) -> SearchEngine:
    """The engine over an unpublished artifact, warm, one query a search, one thread a lane."""
    engine = SearchEngine.load(
        index,
        lanes=lanes,
        max_batch=1,
        max_k=max(k, 1000),
        xla_cache_dir=xla_cache_dir,
        intra_op_threads=1,
    )
    engine.warm_up()
    return engine


def _fingerprint(engine: SearchEngine) -> dict[str, str]:
    """The hashes of what decides a walk: graph, starts and gate."""
    names = ("neighbors_level_0.npy", "start_points.npy", "gate_keys.npy", "item_embs.npy")
    files = engine.manifest.files
    return {name: files[f"arrays/{name}"].sha256 for name in names if f"arrays/{name}" in files}
