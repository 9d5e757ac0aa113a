"""`nann evaluate`: what the artifact that will be published answers, measured with the engine that serves it.

Settings are chosen on validation users and reported on test users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nann.engine.search_engine import SearchEngine
from nann.engine.types import SearchParams
from nann.offline.baselines import evaluate_baselines
from nann.offline.data.dataset import Dataset
from nann.offline.progress import Progress
from nann.offline.report import write_report
from nann.offline.search_quality import (
    EvalUsers,
    Setting,
    answer_users,
    exhaustive_answers,
    items_scored_at,
    summarise,
)
from nann.offline.tuning import PROFILE_TARGETS, choose_profiles, open_for_measuring, tuned_profiles, walks

if TYPE_CHECKING:
    from jaxtyping import Float16, Int32

    from nann.offline.search_quality import Embed

__all__ = ["EvaluateOptions", "QueryForm", "evaluate"]

QueryForm = Literal["history", "comm_seq"]

# NANN's served search with its two published settings and twice and four times the larger (reference/nann.md,
# reference/search-findings.md).
_LEVEL = (
    (100, 200, 200, 200, 200, 200),
    (100, 200, 400, 400, 400, 200),
    (200, 400, 800, 800, 800, 200),
    (400, 800, 1600, 1600, 1600, 200),
)
# For comm_seq: a walk from popular items alone goes far, and on NANN's graph `level` is to reach 0.99.
_COMM_SEQ_BEST_FIRST = tuple(
    SearchParams(ef=ef, beam_width=width) for ef, width in ((1600, 128), (2400, 128), (4000, 256))
)
_COMM_SEQ_LEVEL = ((800, 1600, 3200, 3200, 3200, 200),)
_COMM_SEQ_RECALL = (0.95, 0.98, 0.99)


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
    query_form: QueryForm = "history",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure RUN/index on RUN/data; write quality.json, profiles.json, report.json, report.md and a plot.

    With `exhaustive` (NANN's test_all) only the scan of all items is run and printed, over every test
    user that `options` allow, and nothing is written but ``report_exhaustive.json``.

    With the `query_form` ``comm_seq`` every user is asked for by the embedded history in half precision,
    as NANN's clients do, and nothing is written but ``report_comm_seq.json``; the run must have its model.

    Raises:
        ArtifactError, NotPreparedError: the run directory lacks a step's output, or it is damaged.
        ModelNotTrainedError: there is no model to embed a ``comm_seq``.
        ValueError: the data has no user to evaluate on.
    """
    progress = progress if progress is not None else Progress(silent=True)
    dataset = Dataset.load(run_dir / "data")
    with progress.stage("load and compile"):
        engine = open_for_measuring(
            run_dir / "index", lanes=options.lanes, k=options.k, xla_cache_dir=options.xla_cache_dir
        )
    k, num_items = min(options.k, dataset.num_items), dataset.num_items
    gated = engine.manifest.gate is not None
    embed = None if query_form == "history" else _embedder(run_dir / "model", dataset)
    test = EvalUsers.of(dataset, "test", limit=options.n_report, seed=options.seed, embed=embed)
    truth = exhaustive_answers(engine, test, k=k, progress=progress)
    oracle = summarise(truth, test, truth, k=k, num_items=num_items, seed=options.seed)
    head = {**_head(engine, dataset, options, k, len(test)), "query_form": query_form}
    if exhaustive:
        report = {**head, "exhaustive": oracle}
        (run_dir / "report_exhaustive.json").write_text(json.dumps(report, indent=2) + "\n")
        return report

    def measure(setting: Setting, users: EvalUsers, against: Any) -> dict[str, Any]:
        answers = answer_users(engine, users, setting, k=k, progress=progress)
        return summarise(answers, users, against, k=k, num_items=num_items, seed=options.seed)

    if query_form == "comm_seq":
        rows = [
            measure(setting, test, truth)
            for setting in [
                *walks(k, gated=gated),
                *(Setting(f"best_first ef {p.ef}, beam {p.beam_width}", p) for p in _COMM_SEQ_BEST_FIRST),
                *_levels(k, _LEVEL + _COMM_SEQ_LEVEL),
            ]
        ]
        report = {**head, "exhaustive": oracle, "sweep": rows, "items_scored_at": _costs(rows)}
        (run_dir / "report_comm_seq.json").write_text(json.dumps(report, indent=2) + "\n")
        return report

    settings, tuned = walks(k, gated=gated), []
    chosen = tuned_profiles(run_dir, engine)
    if chosen is None:
        validation = EvalUsers.of(dataset, "validation", limit=options.n_tune, seed=options.seed)
        validation_truth = exhaustive_answers(engine, validation, k=k, progress=progress)
        tuned = [measure(setting, validation, validation_truth) for setting in settings]
        chosen = choose_profiles(tuned, PROFILE_TARGETS)
    profiles, reached = chosen
    balanced = SearchParams(**profiles["balanced"])
    if balanced not in [setting.params for setting in settings]:  # tuned for answers of another size
        settings.append(Setting("balanced, as tuned", balanced))
    reported = [measure(setting, test, truth) for setting in [*settings, *_levels(k, _LEVEL)]]
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


def _embedder(model_dir: Path, dataset: Dataset) -> Embed:
    """Embeds histories as NANN's clients do: the model's own inputs, flattened, in half precision."""
    import tensorflow as tf

    from nann.offline.checkpoints import load_model

    model, _ = load_model(model_dir)
    serving = model.fold(np.asarray(dataset.item_categories))

    def embed(histories: Int32[np.ndarray, "users length"]) -> Float16[np.ndarray, "users width"]:
        inputs = serving.inputs_of(tf.constant(histories)).numpy()
        return inputs.reshape(len(histories), -1).astype(np.float16)  # type: ignore[no-any-return]

    return embed


def _costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Policy -> recall -> the items scored that it takes."""
    return {
        policy: {
            f"{recall:g}": items_scored_at(recall, [row for row in rows if row["policy"] == policy])
            for recall in _COMM_SEQ_RECALL
        }
        for policy in ("best_first", "level")
    }


def _levels(k: int, level: Sequence[tuple[int, ...]]) -> list[Setting]:
    """NANN's searches: the served one with these widths, and the evaluated one."""
    levels = [
        Setting(f"level {list(topn[:5])}", SearchParams(policy="level", level_topn=(*topn[:5], k)))
        for topn in level
    ]
    nanns = SearchParams(policy="level_pruned")
    ef = (*nanns.level_ef[:2], max(nanns.level_ef[2], k))
    return [*levels, Setting(f"level_pruned {list(ef)}", SearchParams(policy="level_pruned", level_ef=ef))]


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
