"""`nann distill`: teach two tables what the model says, so that a walk can leave hopeless items unscored.

The engine that serves is the teacher, users of the training split are asked for, and what is learnt is
kept beside the graph, as a part of the artifact that a search may use or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.artifacts import (
    GATE_KEYS,
    GATE_QUERIES,
    Artifact,
    GateSpec,
    Manifest,
    hash_files,
    write_manifest,
)
from nann.engine.search_engine import SearchEngine
from nann.offline.answer_graph import LEARNT, LearntGraph, ask_for_answers, learn_graph
from nann.offline.build_index import GRAPH_FILE
from nann.offline.data.dataset import Dataset
from nann.offline.extract_embeddings import DataMismatchError
from nann.offline.gate.features import ItemFeatures, input_rows
from nann.offline.gate.student import Student, train_student
from nann.offline.gate.tables import LearnedTables, Quality, measure
from nann.offline.gate.teacher import N_BEST, draw_histories, score_pairs
from nann.offline.progress import Progress
from nann.offline.staging import link_or_copy, staged_directory

if TYPE_CHECKING:
    from jaxtyping import Float32

_MOST_ANSWERS = 15_000  # half a minute on two processors; 12,500 were tried (docs/research/search.md)

__all__ = ["DistillOptions", "DistillReport", "distill"]


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """How much to learn from. `users` and `steps` follow the size of the corpus where they are not given.

    The graph learns from the answers to `answers` training users, by default as many as there are up to
    15,000; 0 leaves it as it is, and so does a graph that has learnt already.
    `dim` and `context_dim` are the tables' widths; `residual_weight` is what a walk keeps of the error
    that it sees at the item it comes from.
    """

    answers: int | None = None
    users: int | None = None
    steps: int | None = None
    held_out_users: int = 100
    dim: int = 16
    context_dim: int = 8
    residual_weight: float = 0.75
    lanes: int | None = None
    seed: int = 0
    xla_cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("users", "steps", "held_out_users", "dim", "lanes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.answers is not None and self.answers < 0:
            raise ValueError(f"answers must not be negative, got {self.answers}")
        if self.context_dim < 0:
            raise ValueError(f"context_dim must not be negative, got {self.context_dim}")
        if not 0 <= self.residual_weight < float("inf"):
            raise ValueError(f"residual_weight must not be negative, got {self.residual_weight}")

    def sized(self, num_items: int) -> tuple[int, int]:
        """(users, steps) for a corpus of so many items."""
        users = self.users if self.users is not None else min(max(num_items // 100, 300), 2000)
        steps = self.steps if self.steps is not None else min(max(num_items // 100, 300), 1500)
        return users, steps


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What was written and how good it is. `features` is what the student saw of an item."""

    index: Path
    num_items: int
    answers: int
    users: int
    steps: int
    features: str
    quality: Quality
    table_bytes: int
    teacher_s: float
    training_s: float


def distill(
    run_dir: Path, *, options: DistillOptions = DistillOptions(), progress: Progress | None = None
) -> DistillReport:
    """Add to RUN/index what is learnt from asking RUN/data's training users: links, start points, the gate.

    The index is replaced whole: its other files are linked, not copied. Of RUN/model, where there is one,
    the items' input rows are used beside their embeddings.

    Raises:
        FileNotFoundError: there is no complete index.
        ArtifactError, NotPreparedError, ModelNotTrainedError: a part of the run is missing or damaged.
        DataMismatchError: RUN/data is not what the index was made from.
        ValueError: an option is not usable, there are no training users with a history, the index has no
            embeddings, or the model is another one than the index's.
    """
    progress = progress if progress is not None else Progress(silent=True)
    index = run_dir / "index"
    if not (index / "manifest.json").is_file() or not (index / GRAPH_FILE).is_file():
        raise FileNotFoundError(
            f"{index} holds no artifact; make it with: "
            f"nann index --embeddings {run_dir / 'embeddings'} --output {index}"
        )
    dataset = Dataset.load(run_dir / "data")
    artifact = Artifact.open(index)
    embeddings = _checked(artifact, dataset)
    users, steps = options.sized(artifact.num_items)
    train, held_out = draw_histories(
        dataset, n_train=users, n_held_out=options.held_out_users, seed=options.seed
    )
    started_s = monotonic()
    with progress.stage("load and compile"):
        engine = _load(index, options)
    learnt = _learn_graph(engine, artifact, dataset, options, progress)
    asked = {
        part: score_pairs(
            engine, artifact, histories, seed=options.seed, progress=progress, title=f"ask for {part} users"
        )
        for part, histories in (("training", train), ("held-out", held_out))
    }
    engine.close()
    taught_s = monotonic()
    inputs = input_rows(run_dir / "model", dataset, artifact)
    features = ItemFeatures(embeddings, inputs)
    scores = asked["training"].scores
    student = Student(
        features.width,
        dim=options.dim,
        context_dim=options.context_dim,
        center=float(scores.mean()),
        scale=float(scores.std()) or 1.0,
        seed=options.seed,
    )
    train_student(student, asked["training"], features, steps=steps, seed=options.seed, progress=progress)
    tables = student.tables(features, artifact.num_items)
    with progress.stage("measure"):
        quality = measure(tables, asked["held-out"])
    report = DistillReport(
        index=index,
        num_items=artifact.num_items,
        answers=0 if learnt is None else learnt.account[LEARNT],
        users=users,
        steps=steps,
        features="embedding" if inputs is None else "embedding, input",
        quality=quality,
        table_bytes=tables.keys.nbytes + tables.queries.nbytes,
        teacher_s=taught_s - started_s,
        training_s=monotonic() - taught_s,
    )
    with progress.stage(f"write {index}"):
        _write(index, artifact.manifest, tables, _spec(options, report), learnt)
    return report


def _checked(artifact: Artifact, dataset: Dataset) -> Float32[np.ndarray, "N D"]:
    """The embeddings of an artifact that was made from this data."""
    made_from, found = artifact.manifest.data_hash, dataset.meta.data_hash
    if artifact.num_items != dataset.num_items or (made_from and made_from != found):
        raise DataMismatchError(
            f"{dataset.directory} ({dataset.num_items:,} items, data hash {found}) is not what "
            f"{artifact.directory} was made from ({artifact.num_items:,} items, {made_from})"
        )
    if artifact.item_vectors is None:
        raise ValueError(f"{artifact.directory} has no item embeddings; make it again with nann index")
    return artifact.item_vectors


def _load(index: Path, options: DistillOptions) -> SearchEngine:
    # One thread a lane, and afterwards one for training: TensorFlow settles it once in a process, results
    # are then the same on any machine, and the lanes use all processors while the teacher is asked.
    engine = SearchEngine.load(
        index,
        scorer="tensorflow",
        lanes=options.lanes if options.lanes is not None else len(os.sched_getaffinity(0)),
        max_batch=1,
        max_k=N_BEST,
        verify="fast",
        xla_cache_dir=options.xla_cache_dir,
        intra_op_threads=1,
    )
    engine.warm_up()
    return engine


def _spec(options: DistillOptions, report: DistillReport) -> GateSpec:
    training: Mapping[str, Any] = {
        "users": report.users,
        "steps": report.steps,
        "seed": options.seed,
        "features": report.features,
        "held_out": {name: value for name, value in asdict(report.quality).items() if name != "rmse"},
    }
    return GateSpec(
        dim=options.dim,
        context_dim=options.context_dim,
        residual_weight=options.residual_weight,
        rmse=report.quality.rmse,
        training=dict(training),
    )


def _learn_graph(
    engine: SearchEngine, artifact: Artifact, dataset: Dataset, options: DistillOptions, progress: Progress
) -> LearntGraph | None:
    """The graph with what the answers say of it; None where it is to stay as it is."""
    with_history = dataset.user_lengths[dataset.users_of("train")] > 0
    wanted = min(int(np.count_nonzero(with_history)), _MOST_ANSWERS)
    wanted = wanted if options.answers is None else options.answers
    if not wanted or LEARNT in artifact.manifest.graph:
        return None
    histories, _ = draw_histories(dataset, n_train=wanted, n_held_out=0, seed=options.seed)
    with progress.stage("ask for answers", total=len(histories), unit="users") as stage:
        answers = ask_for_answers(engine, artifact, histories, stage.advance)
    with progress.stage("learn links and starts"):
        return learn_graph(artifact, answers)


def _write(
    index: Path, manifest: Manifest, tables: LearnedTables, spec: GateSpec, learnt: LearntGraph | None
) -> None:
    """Replace the index by itself with these tables, and this graph where there is one."""
    graph = manifest.graph if learnt is None else learnt.account
    with staged_directory(index, mark=GRAPH_FILE) as staging:
        (staging / "arrays").mkdir()
        np.save(staging / "arrays" / GATE_KEYS, tables.keys)
        np.save(staging / "arrays" / GATE_QUERIES, tables.queries)
        if learnt is not None:
            learnt.write(staging / "arrays")
            (staging / GRAPH_FILE).write_text(json.dumps(graph, indent=2) + "\n", encoding="utf-8")
        written = hash_files(staging)
        for path in sorted(path for path in index.rglob("*") if path.is_file()):
            relative = path.relative_to(index).as_posix()
            if relative not in (*written, "manifest.json"):
                link_or_copy(path, staging / relative)
        write_manifest(
            staging,
            manifest.model_copy(
                update={"files": {**manifest.files, **written}, "gate": spec, "graph": dict(graph)}
            ),
        )
