"""`nann evaluate`: what the artifact that will be published answers, measured with the engine that serves it.

Settings are chosen on validation users and reported on test users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nann.engine.search_engine import SearchEngine
from nann.engine.types import SearchParams
from nann.offline.baselines import evaluate_baselines
from nann.offline.data.dataset import Dataset
from nann.offline.progress import Progress
from nann.offline.report import write_report
from nann.offline.search_quality import EvalUsers, Setting, answer_users, exhaustive_answers, summarise

__all__ = ["EvaluateOptions", "evaluate"]

# best_first over a decade of costs, and NANN's served search with its two published settings and
# twice and four times the larger (reference/nann.md, reference/search-findings.md).
_BEST_FIRST = ((100, 32), (200, 32), (200, 64), (300, 64), (400, 64), (600, 64), (800, 64), (1200, 128))
_LEVEL = (
    (100, 200, 200, 200, 200, 200),
    (100, 200, 400, 400, 400, 200),
    (200, 400, 800, 800, 800, 200),
    (400, 800, 1600, 1600, 1600, 200),
)
_PROFILE_RECALL = {"fast": 0.95, "balanced": 0.985}


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How much to measure: answers of `k` items for up to `n_tune` validation and `n_report` test users."""

    k: int = 200
    n_tune: int = 300
    n_report: int = 1000
    lanes: int = 2
    seed: int = 0
    baselines: bool = True
    xla_cache_dir: Path | None = None


def evaluate(
    run_dir: Path,
    *,
    options: EvaluateOptions = EvaluateOptions(),
    exhaustive: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure RUN/index on RUN/data; write quality.json, profiles.json, report.json, report.md and a plot.

    With `exhaustive` (NANN's test_all) only the scan of all items is run and printed, over every test
    user that `options` allow, and nothing is written but ``report_exhaustive.json``.

    Raises:
        ArtifactError, NotPreparedError: the run directory lacks a step's output, or it is damaged.
        ValueError: the data has no user to evaluate on.
    """
    progress = progress if progress is not None else Progress(silent=True)
    dataset = Dataset.load(run_dir / "data")
    with progress.stage("load and compile"):
        engine = SearchEngine.load(
            run_dir / "index",
            lanes=options.lanes,
            max_batch=1,
            max_k=max(options.k, 1000),
            xla_cache_dir=options.xla_cache_dir,
            intra_op_threads=1,
        )
        engine.warm_up()
    k, num_items = min(options.k, dataset.num_items), dataset.num_items
    test = EvalUsers.of(dataset, "test", limit=options.n_report, seed=options.seed)
    truth = exhaustive_answers(engine, test, k=k, progress=progress)
    oracle = summarise(truth, test, truth, k=k, num_items=num_items, seed=options.seed)
    head = _head(engine, dataset, options, k, len(test))
    if exhaustive:
        report = {**head, "exhaustive": oracle}
        (run_dir / "report_exhaustive.json").write_text(json.dumps(report, indent=2) + "\n")
        return report

    tune = EvalUsers.of(dataset, "validation", limit=options.n_tune, seed=options.seed)
    tune_truth = exhaustive_answers(engine, tune, k=k, progress=progress)

    def measure(setting: Setting, users: EvalUsers, against: Any) -> dict[str, Any]:
        answers = answer_users(engine, users, setting, k=k, progress=progress)
        return summarise(answers, users, against, k=k, num_items=num_items, seed=options.seed)

    settings = _settings(k)
    tuned = [measure(s, tune, tune_truth) for s in settings if s.params.policy == "best_first"]
    profiles, reached = _choose_profiles(tuned)
    reported = [measure(s, test, truth) for s in settings]
    baselines = (
        [asdict(row) for row in evaluate_baselines(dataset, k=k, seed=options.seed, progress=progress)]
        if options.baselines
        else []
    )
    served = next(row for row in reported if row["params"] == _walk(profiles["balanced"]))
    report = {
        **head,
        "exhaustive": oracle,
        "served": {**served, "profile": "balanced", "profile_target_reached": reached["balanced"]},
        "profiles": profiles,
        "profiles_reached": reached,
        "sweep": reported,
        "tuning": tuned,
        "baselines": baselines,
    }
    engine.close()
    _write(run_dir, report)
    return report


def _head(
    engine: SearchEngine, dataset: Dataset, options: EvaluateOptions, k: int, n_users: int
) -> dict[str, Any]:
    return {
        "k": k,
        "num_items": dataset.num_items,
        "n_test_users": n_users,
        "n_tune_users": options.n_tune,
        "seed": options.seed,
        "model": engine.manifest.model_type,
        "graph": engine.manifest.graph,
        "builder": engine.manifest.builder,
        "training": engine.manifest.training,
        "data": {"hash": dataset.meta.data_hash, "num_users": dataset.num_users},
    }


def _settings(k: int) -> list[Setting]:
    walks = [
        Setting(
            f"best_first ef {max(ef, k)}, beam {width}",
            SearchParams(policy="best_first", ef=max(ef, k), beam_width=width),
        )
        for ef, width in _BEST_FIRST
    ]
    levels = [
        Setting(f"level {list(topn[:5])}", SearchParams(policy="level", level_topn=(*topn[:5], k)))
        for topn in _LEVEL
    ]
    return [*{s.params: s for s in walks}.values(), *levels]


def _choose_profiles(
    tuned: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, bool]]:
    """For each profile the cheapest setting that reaches its recall when tuned, else the best one."""
    profiles: dict[str, dict[str, Any]] = {}
    reached = {}
    for name, target in _PROFILE_RECALL.items():
        good = [row for row in tuned if row["recall"] >= target]
        row = (
            min(good, key=lambda row: row["items_scored"]) if good else max(tuned, key=lambda r: r["recall"])
        )
        profiles[name] = {"policy": "best_first", **row["params"]}
        reached[name] = bool(good)
    profiles["exact"] = {"policy": "exhaustive"}
    reached["exact"] = True
    return profiles, reached


def _walk(profile: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in profile.items() if name != "policy"}


def _write(run_dir: Path, report: Mapping[str, Any]) -> None:
    served, exact = report["served"], report["exhaustive"]
    quality = {
        "k": report["k"],
        "n_test_users": report["n_test_users"],
        "hit_rate": served["hit_rate"],
        "hit_rate_exhaustive": exact["hit_rate"],
        "recall": served["recall"],
        "recall_p5": served["recall_p5"],
        "items_scored": served["items_scored"],
        "share_scored": served["share_scored"],
    }
    for name, content in (
        ("quality.json", quality),
        ("profiles.json", report["profiles"]),
        ("report.json", report),
    ):
        (run_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_report(run_dir, report)
