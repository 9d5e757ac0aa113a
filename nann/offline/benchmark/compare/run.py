"""The whole comparison over one corpus: truth, sweeps, choice, times; its result is one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nann.offline.benchmark.compare.choice import (
    Point,
    cheapest_reaching,
    pareto,
    point,
    ratio,
    thinned,
    worth_measuring,
)
from nann.offline.benchmark.compare.contender import Contender, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import NANN_GRAPH, OWN_GRAPH, Corpus, CorpusOptions, open_corpus
from nann.offline.benchmark.compare.engine_contenders import (
    BASELINE,
    EXHAUSTIVE,
    SWEEPS,
    EngineContender,
    Sweep,
    engine_contenders,
    level_sweep,
)
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.quality import (
    Measured,
    Truth,
    exhaustive_truth,
    measure,
    measured_truth,
)
from nann.offline.benchmark.compare.rivals import index_contenders
from nann.offline.benchmark.compare.scann import scann_contenders
from nann.offline.benchmark.compare.tf_port import embedder, tf_port_contenders
from nann.offline.benchmark.compare.timing import Timed, time_in_rounds
from nann.offline.benchmark.compare.vectors import best_source, vector_sources
from nann.offline.benchmark.machine import Machine
from nann.offline.progress import Progress

__all__ = ["TARGETS", "CompareOptions", "compare", "compare_corpus"]

TARGETS = (0.95, 0.98, 0.99)
_PACKAGES = ("faiss-cpu", "hnswlib", "jax")
# Of a contender that reaches no recall target a few points tell where it ends.
_POINTS_WITHOUT_A_TARGET = 4


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How much to measure. `screening_users`: validation users on whom every setting is tried, before those
    that another clearly beats are left out. `points`: most settings of a contender that are reported on
    test users and drawn; `timed_points`: most that are timed, besides those chosen for a recall target.
    `only`: contenders whose names begin so, and the exhaustive search; all of them where it is empty."""

    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    screening_users: int = 60
    points: int = 12
    timing: bool = True
    timed_points: int = 5
    timed_users: int = 200
    rounds: int = 3
    budget: TimingBudget = field(default_factory=TimingBudget)
    only: tuple[str, ...] = ()

    def wants(self, contender: str) -> bool:
        """Whether a contender of this name takes part."""
        return not self.only or contender.startswith((EXHAUSTIVE, *self.only))


@dataclass(slots=True)
class _Entry:
    """A contender with what was measured: `tuned` over `settings`, `reported` of the `kept` places."""

    contender: Contender
    settings: list[Setting]
    tuned: list[Point]
    chosen: dict[float, int]
    kept: list[int]
    reported: dict[int, Measured]


def compare(
    name: str,
    run_dir: Path,
    version_dir: Path,
    work: Path,
    *,
    scann: Path,
    options: CompareOptions = CompareOptions(),
    progress: Progress,
) -> dict[str, Any]:
    """Measure all contenders over one run and keep the result as ``work/report.json``.

    `scann` is the directory of ScaNN's environment, made where it is not there. Times of an earlier run
    are kept where this one takes none, with the machine they were taken on.

    Raises:
        ArtifactError, NotPreparedError, FileNotFoundError, ValueError: the run lacks something.
    """
    corpus = open_corpus(name, run_dir, version_dir, work, options=options.corpus, progress=progress)
    try:
        return compare_corpus(corpus, run_dir, scann, options, progress)
    finally:
        corpus.close()


def compare_corpus(
    corpus: Corpus, run_dir: Path, scann: Path, options: CompareOptions, progress: Progress
) -> dict[str, Any]:
    """`compare` over an opened corpus."""
    sweeps = [sweep for sweep in SWEEPS if options.wants(sweep.contender)]
    found: list[Any] = list(engine_contenders(corpus, sweeps))
    exhaustive = next(one for one in found if isinstance(one, EngineContender) and one.name == EXHAUSTIVE)
    with progress.stage(f"{corpus.name}: exhaustive answers"):
        tune_truth = exhaustive_truth(corpus, exhaustive, corpus.tune)
        test_truth = exhaustive_truth(corpus, exhaustive, corpus.test)
    source, shares = best_source(vector_sources(corpus.artifact, run_dir), corpus.tune, tune_truth.item_index)
    with progress.stage(f"{corpus.name}: indexes of the rivals"):
        ports = [port for port in _ports(corpus) if options.wants(port[2])]
        found += tf_port_contenders(corpus, ports, embedder(run_dir))
        found += index_contenders(corpus, source, wants=options.wants)
        if options.wants("ScaNN"):
            found += scann_contenders(corpus, source, scann)
    contenders: list[Contender] = [one for one in found if not isinstance(one, Skipped)]
    for one in found:
        if isinstance(one, Skipped):
            progress.line(f"{corpus.name}: {one.contender} is left out: {one.reason}")
    entries = [_sweep(corpus, one, tune_truth, test_truth, options, progress) for one in contenders]
    path = corpus.work / "report.json"
    report = {
        "name": corpus.name,
        "machine": asdict(_machine()),
        "corpus": _described(corpus, entries),
        "vectors": {"chosen": None if source is None else source.name, "share_within": shares},
        "skipped": [asdict(one) for one in found if isinstance(one, Skipped)],
        "only": list(options.only),
        "contenders": [_entry_json(corpus, entry) for entry in entries],
        "targets": [_target(corpus, entries, target) for target in TARGETS],
        "timing": _earlier_timing(path),
    }
    _write(path, report)
    if options.timing:
        report["timing"] = _timing(corpus, entries, options, progress)
        # What a contender notes may tell what only its timed requests showed.
        report["contenders"] = [_entry_json(corpus, entry) for entry in entries]
        _write(path, report)
    for one in contenders:
        close = getattr(one, "close", None)
        if close is not None:
            close()
    return report


def _ports(corpus: Corpus) -> list[tuple[EngineContender, Path, str]]:
    """The engine's `level` beside which the port is put, on both graphs."""
    return [
        (
            EngineContender(corpus, Sweep(level, graph, "level", level_sweep)),
            artifact.directory,
            f"TF 2 port, {words}",
        )
        for graph, artifact, level, words in (
            (NANN_GRAPH, corpus.nann_artifact, BASELINE, "NANN's graph"),
            (OWN_GRAPH, corpus.artifact, "level, own graph", "own graph"),
        )
    ]


def _sweep(
    corpus: Corpus,
    contender: Contender,
    tune: Truth,
    test: Truth,
    options: CompareOptions,
    progress: Progress,
) -> _Entry:
    """Every setting on the users who choose, what is worth showing on the others."""
    per_score = corpus.multiply_adds.score
    title = f"{corpus.name}: {contender.name}"

    def measured(setting: Setting, users: UserSet, truth: Truth) -> Measured:
        if contender.name == EXHAUSTIVE:
            return measured_truth(corpus, setting, users, truth)
        return measure(corpus, contender, setting, users, truth)

    def points(settings: Sequence[Setting], users: UserSet, truth: Truth) -> list[Point]:
        with progress.stage(f"{title}, {len(users):,} users", len(settings), "settings") as stage:
            found = []
            for setting in settings:
                found.append(point(measured(setting, users, truth), per_score))
                stage.advance()
            return found

    settings = list(contender.settings)
    if len(settings) > 1 and len(corpus.tune) > options.screening_users:
        few = options.screening_users
        screened = points(settings, corpus.tune.first(few), tune.first(few))
        settings = [settings[place] for place in worth_measuring(screened)]
    tuned = points(settings, corpus.tune, tune)
    reaching = {target: cheapest_reaching(tuned, target) for target in TARGETS}
    chosen = {target: place for target, place in reaching.items() if place is not None}
    kept = thinned(pareto(tuned), options.points if chosen else _POINTS_WITHOUT_A_TARGET, [*chosen.values()])
    with progress.stage(f"{title}, {len(corpus.test):,} users", len(kept), "settings") as stage:
        reported = {}
        for place in kept:
            reported[place] = measured(settings[place], corpus.test, test)
            stage.advance()
    return _Entry(contender, settings, tuned, chosen, kept, reported)


def _target(corpus: Corpus, entries: Sequence[_Entry], target: float) -> dict[str, Any]:
    """Every contender's cheapest setting that reaches the target, and the baseline's cost in terms of it."""
    per_score = corpus.multiply_adds.score
    baseline = next((entry for entry in entries if entry.contender.name == BASELINE), None)
    costs = None
    if baseline is not None and target in baseline.chosen:
        costs = baseline.reported[baseline.chosen[target]].cost(per_score)
    rows, missed = [], []
    for entry in entries:
        if target not in entry.chosen:
            best = max(entry.tuned, key=lambda one: one.recall.mean)
            missed.append(
                {"contender": entry.contender.name, "recall": best.recall.mean, "cost": best.cost.mean}
            )
            continue
        measured = entry.reported[entry.chosen[target]]
        rows.append(
            {
                "contender": entry.contender.name,
                **asdict(point(measured, per_score)),
                "baseline_over_cost": None
                if costs is None
                else asdict(ratio(costs, measured.cost(per_score))),
            }
        )
    rows.sort(key=lambda row: row["cost"]["mean"])
    return {"target": target, "baseline": BASELINE, "rows": rows, "missed": missed}


def _timing(
    corpus: Corpus, entries: Sequence[_Entry], options: CompareOptions, progress: Progress
) -> dict[str, Any]:
    timed: list[tuple[Contender, Setting]] = []
    for entry in entries:
        places = thinned(entry.kept, options.timed_points, list(entry.chosen.values()))
        timed += [(entry.contender, entry.settings[place]) for place in places]
    machine = _machine()
    some = corpus.test.first(options.timed_users)
    rows = time_in_rounds(
        timed, some, corpus.k, rounds=options.rounds, budget=options.budget, progress=progress
    )
    return {
        "machine": asdict(machine),
        "rounds": options.rounds,
        "users": len(some),
        "lanes": corpus.options.lanes,
        "rows": [_timed_json(row) for row in rows],
    }


def _timed_json(row: Timed) -> dict[str, Any]:
    return {**asdict(row), "median_qps": row.median_qps}


def _described(corpus: Corpus, entries: Iterable[_Entry]) -> dict[str, Any]:
    manifest = corpus.artifact.manifest
    exhaustive = next(entry for entry in entries if entry.contender.name == EXHAUSTIVE)
    whole = point(next(iter(exhaustive.reported.values())), corpus.multiply_adds.score)
    return {
        "num_items": corpus.num_items,
        "model": manifest.model_type,
        "training": manifest.training,
        "data_hash": manifest.data_hash,
        "graphs": {
            OWN_GRAPH: {**manifest.builder, **manifest.graph},
            NANN_GRAPH: {**corpus.nann_artifact.manifest.builder, **corpus.nann_artifact.manifest.graph},
        },
        "k": corpus.k,
        "n_tune": len(corpus.tune),
        "n_test": len(corpus.test),
        "hit_rate_exhaustive": asdict(whole.hit_rate),
        "multiply_adds": asdict(corpus.multiply_adds),
        "placement": corpus.engines[OWN_GRAPH].placement,
        "lanes": corpus.options.lanes,
        "max_batch": corpus.options.max_batch,
    }


def _entry_json(corpus: Corpus, entry: _Entry) -> dict[str, Any]:
    per_score = corpus.multiply_adds.score
    return {
        "name": entry.contender.name,
        "note": entry.contender.note,
        "same_counts_as": entry.contender.settings[0].answers_of,
        "n_settings": len(entry.contender.settings),
        "chosen": {f"{target:g}": entry.tuned[place].setting for target, place in entry.chosen.items()},
        "tuned": [asdict(one) for one in entry.tuned],
        "reported": [asdict(point(entry.reported[place], per_score)) for place in entry.kept],
    }


def _machine() -> Machine:
    here = Machine.here()
    versions = {name: metadata.version(name) for name in _PACKAGES if _installed(name)}
    return replace(here, versions={**here.versions, **versions})


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _earlier_timing(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))["timing"] if path.is_file() else None


def _write(path: Path, report: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
