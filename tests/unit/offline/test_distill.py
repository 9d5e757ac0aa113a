"""The tables of the gate: learnt from training users alone, near the scores, whole in the artifact or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nann.engine.artifacts import Artifact, hash_files, read_manifest, write_manifest
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline import distill as module
from nann.offline.build_index import build_index
from nann.offline.checkpoints import save_weights, write_json
from nann.offline.data import rules
from nann.offline.data.dataset import Dataset
from nann.offline.data.errors import NotPreparedError
from nann.offline.distill import DistillOptions, DistillReport, distill
from nann.offline.extract_embeddings import DataMismatchError, extract
from nann.offline.gate import student as student_module
from nann.offline.gate.features import ItemFeatures
from nann.offline.gate.student import Student
from nann.offline.gate.tables import LearnedTables, measure
from nann.offline.gate.teacher import Pairs, draw_histories, score_pairs
from nann.offline.models.model import ModelSpec
from nann.offline.models.registry import create_model
from nann.offline.progress import Progress

SILENT = Progress(silent=True)
N = 60  # items of the data
OPTIONS = DistillOptions(answers=0, users=300, steps=300, held_out_users=12, dim=4, context_dim=2, lanes=2)
TABLES = ("arrays/gate_keys.npy", "arrays/gate_queries.npy")


@pytest.fixture(scope="module")
def engines() -> Iterator[list[SearchEngine]]:
    """The engine that the first `distill` loaded, and every later one asks: compiling takes seconds."""
    load, loaded = module._load, list[SearchEngine]()

    def once(index: Path, options: DistillOptions) -> SearchEngine:
        if not loaded:
            loaded.append(load(index, options))
        return loaded[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_load", once)
        patch.setattr(SearchEngine, "close", lambda self: None)
        for size, small in {"USERS_A_STEP": 8, "BEST_A_USER": 32, "OTHERS_A_USER": 16, "UNITS": 32}.items():
            patch.setattr(student_module, size, small)
        yield loaded
    for engine in loaded:
        engine.close()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    write_dataset: Callable[..., Path],
    engines: list[SearchEngine],
) -> tuple[Path, DistillReport]:
    """A run after `nann distill`; not to be changed."""
    run = tmp_path_factory.mktemp("distill") / "run"
    write_dataset(run / "data")
    write_untrained_model(run / "data", run / "model")
    extract(run / "model", run / "embeddings", progress=SILENT)
    build_index(run / "embeddings", run / "index")
    return run, distill(run, options=OPTIONS)


def write_untrained_model(data: Path, directory: Path) -> None:
    """What `nann train` leaves, as far as `extract` and `distill` read it: any weights score something."""
    dataset = Dataset.load(data)
    spec = ModelSpec(dataset.num_items, dataset.num_categories, dataset.history_length)
    directory.mkdir()
    save_weights(create_model("dnn", spec, seed=1), directory / "weights.npz")
    config = {
        "model": "dnn",
        "spec": asdict(spec),
        "data_dir": str(data),
        "data_hash": dataset.meta.data_hash,
        "training": {"seed": 1},
        **dict.fromkeys(("step", "total_steps", "best_step", "validation", "collapsed_at_step")),
    }
    write_json(directory / "config.json", config)


@pytest.fixture
def run(finished: tuple[Path, DistillReport], tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def contents(directory: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in hash_files(directory).items()}


# -- the graph ------------------------------------------------------------------------------------


def test_the_graph_learns_once_from_answers(run: Path) -> None:
    before = Artifact.open(run / "index")
    tables = [np.array(table) for table in before.neighbors]
    starts = np.array(before.start_points)
    report = distill(run, options=replace(OPTIONS, answers=40, steps=2))
    learnt = Artifact.open(run / "index", verify="full")
    assert report.answers == learnt.manifest.graph["answers"] == 40
    assert learnt.manifest.graph["unreachable"] == {"entry_points": 0, "start_points": 0}
    assert learnt.neighbors[0].shape == tables[0].shape
    assert not np.array_equal(learnt.neighbors[0], tables[0])
    assert np.array_equal(learnt.neighbors[1], tables[1])
    assert not np.array_equal(learnt.start_points, starts) and set(learnt.start_points) >= set(starts)
    table, bytes_before = np.array(learnt.neighbors[0]), contents(run / "index")
    assert distill(run, options=replace(OPTIONS, answers=40, steps=2)).answers == 0
    assert np.array_equal(Artifact.open(run / "index").neighbors[0], table)
    changed = {name for name, digest in contents(run / "index").items() if digest != bytes_before[name]}
    assert changed <= {*TABLES}


# -- the step --------------------------------------------------------------------------------------


def test_the_tables_are_in_the_artifact_and_estimate_the_scores(
    finished: tuple[Path, DistillReport],
) -> None:
    run, report = finished
    artifact = Artifact.open(run / "index", verify="full")
    spec = artifact.manifest.gate
    assert spec is not None
    assert (spec.dim, spec.context_dim, spec.residual_weight) == (4, 2, 0.75)
    assert artifact.gate_keys.shape == artifact.gate_queries.shape == (N, 7)
    assert artifact.gate_keys.dtype == artifact.gate_queries.dtype == np.float16
    assert set(TABLES) <= set(artifact.manifest.files)
    assert spec.rmse == report.quality.rmse < 0.6 * report.quality.spread
    assert report.quality.correlation > 0.9
    assert spec.training["users"] == 300 and spec.training["features"] == "embedding, input"


def test_the_error_in_the_manifest_is_that_of_the_stored_tables(
    finished: tuple[Path, DistillReport], engines: list[SearchEngine]
) -> None:
    """Over again from the files alone: other users' exact scores, the formula of docs/artifact.md."""
    run, report = finished
    artifact, dataset = Artifact.open(run / "index"), Dataset.load(run / "data")
    keys, queries = (np.asarray(table, np.float64) for table in (artifact.gate_keys, artifact.gate_queries))
    _, held_out = draw_histories(dataset, n_train=300, n_held_out=12, seed=0)
    pairs = score_pairs(engines[0], artifact, held_out, seed=0, progress=SILENT, title="")
    squared = [
        (
            queries[i, 0]
            + max(keys[j, 0] + keys[j, 1:5] @ queries[i, 1:5] for j in history[history >= 0])
            + np.mean([keys[j, 5:] @ queries[i, 5:] for j in history[history >= 0]])
            - score
        )
        ** 2
        for history, items, scores in zip(pairs.histories, pairs.items, pairs.scores, strict=True)
        for i, score in zip(items, scores, strict=True)
    ]
    assert np.sqrt(np.mean(squared)) == pytest.approx(report.quality.rmse, rel=1e-4)


def test_again_it_replaces_the_tables_and_nothing_else(run: Path) -> None:
    before, inode = contents(run / "index"), (run / "index" / "saved_model.pb").stat().st_ino
    distill(run, options=OPTIONS)
    assert contents(run / "index") == before  # the same users, weights and samples: the same bytes
    assert (run / "index" / "saved_model.pb").stat().st_ino == inode
    distill(run, options=replace(OPTIONS, seed=1, steps=2, dim=3))
    after = contents(run / "index")
    assert {name for name in before if after[name] != before[name]} == set(TABLES)
    assert after.keys() == before.keys()
    Artifact.open(run / "index", verify="full")
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_new_index_has_no_tables(run: Path) -> None:
    build_index(run / "embeddings", run / "index")
    artifact = Artifact.open(run / "index", verify="full")
    assert artifact.manifest.gate is None and artifact.gate_keys is None
    assert not any((run / "index" / name).exists() for name in TABLES)


def test_a_failure_leaves_the_index_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    before, manifest = contents(run / "index"), read_manifest(run / "index")
    monkeypatch.setattr(module, "write_manifest", fail)
    with pytest.raises(OSError, match="no space"):
        distill(run, options=replace(OPTIONS, steps=1, users=4, held_out_users=2))
    assert contents(run / "index") == before and read_manifest(run / "index") == manifest
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_model_from_elsewhere_is_learnt_from_its_embeddings(run: Path) -> None:
    shutil.rmtree(run / "model")
    report = distill(run, options=replace(OPTIONS, steps=5))
    assert report.features == "embedding"


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["index", "index/manifest.json"])
def test_without_an_index_it_says_how_to_make_one(run: Path, missing: str) -> None:
    (shutil.rmtree if (run / missing).is_dir() else Path.unlink)(run / missing)
    with pytest.raises(FileNotFoundError, match="nann index"):
        distill(run, options=OPTIONS)


def test_without_data_it_says_so(run: Path) -> None:
    shutil.rmtree(run / "data")
    with pytest.raises(NotPreparedError, match="data"):
        distill(run, options=OPTIONS)


def test_data_of_another_run_are_refused(run: Path, write_dataset: Callable[..., Path]) -> None:
    shutil.rmtree(run / "data")
    write_dataset(run / "data", seed=5)
    with pytest.raises(DataMismatchError, match="data hash"):
        distill(run, options=OPTIONS)


def test_an_artifact_without_embeddings_is_refused(run: Path) -> None:
    (run / "index" / "arrays" / "item_embs.npy").unlink()
    manifest = read_manifest(run / "index")
    files = {name: entry for name, entry in manifest.files.items() if not name.endswith("item_embs.npy")}
    write_manifest(run / "index", manifest.model_copy(update={"files": files}))
    with pytest.raises(ValueError, match="no item embeddings"):
        distill(run, options=OPTIONS)


def test_a_model_trained_again_since_is_refused(run: Path) -> None:
    with np.load(run / "model" / "weights.npz") as weights:
        moved = {name: weights[name] + (name == "item_table") for name in weights.files}
    np.savez(run / "model" / "weights.npz", **moved)
    with pytest.raises(ValueError, match="nann extract"):
        distill(run, options=OPTIONS)


@pytest.mark.parametrize(
    "wrong", [{"users": 0}, {"steps": 0}, {"dim": 0}, {"context_dim": -1}, {"residual_weight": float("nan")}]
)
def test_options_of_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillOptions(**wrong)


def test_the_work_follows_the_corpus() -> None:
    assert DistillOptions().sized(3_000) == (300, 300)
    assert DistillOptions().sized(500_000) == (2000, 1500)
    assert DistillOptions(users=7, steps=9).sized(500_000) == (7, 9)


# -- whom it asks for ------------------------------------------------------------------------------


def with_lengths(directory: Path, lengths: list[int], split: list[int]) -> Dataset:
    """The tiny data set cut to these users."""
    dataset = Dataset.load(directory)
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return replace(
        dataset,
        user_ids=dataset.user_ids[: len(lengths)],
        user_row_splits=splits,
        user_items=dataset.user_items[: splits[-1]],
        user_split=np.array(split, np.int8),
    )


def test_only_training_users_are_asked_for_and_no_user_is_on_both_sides(tiny_data: Path) -> None:
    dataset = with_lengths(tiny_data, [20] * 12, [rules.TRAIN] * 8 + [rules.TEST, rules.VALIDATION] * 2)
    dataset = replace(dataset, user_items=np.repeat(np.arange(12, dtype=np.int32), 20))  # an item a user
    train_part, held_out = draw_histories(dataset, n_train=40, n_held_out=6, seed=3)
    assert train_part.shape == (40, rules.HISTORY_LENGTH) and held_out.shape == (6, rules.HISTORY_LENGTH)
    of_train, of_held_out = ({int(i) for i in part[part >= 0]} for part in (train_part, held_out))
    assert of_train | of_held_out <= set(range(8))
    assert of_held_out and not of_train & of_held_out


def test_histories_end_anywhere_from_the_first_item_on(tiny_data: Path) -> None:
    dataset = with_lengths(tiny_data, [4] * 10, [rules.TRAIN] * 10)
    train_part, _ = draw_histories(dataset, n_train=200, n_held_out=1, seed=0)
    assert set((train_part >= 0).sum(axis=1).tolist()) == {1, 2, 3, 4}


def test_users_of_one_item_are_enough(tiny_data: Path) -> None:
    dataset = with_lengths(tiny_data, [1, 1, 0], [rules.TRAIN] * 3)
    train_part, held_out = draw_histories(dataset, n_train=3, n_held_out=2, seed=0)
    assert (train_part[:, 0] >= 0).all() and (train_part[:, 1:] == -1).all()
    assert len(held_out) == 2


@pytest.mark.parametrize("lengths", [[], [0, 0], [5, 0]])
def test_too_few_histories_are_refused(tiny_data: Path, lengths: list[int]) -> None:
    dataset = with_lengths(tiny_data, lengths, [rules.TRAIN] * len(lengths))
    with pytest.raises(ValueError, match="training users with a history"):
        draw_histories(dataset, n_train=3, n_held_out=2, seed=0)


def test_the_pairs_are_the_engines_own_scores(
    finished: tuple[Path, DistillReport], engines: list[SearchEngine]
) -> None:
    run, _ = finished
    artifact, dataset, engine = Artifact.open(run / "index"), Dataset.load(run / "data"), engines[0]
    histories, _ = draw_histories(dataset, n_train=5, n_held_out=1, seed=2)
    pairs = score_pairs(engine, artifact, histories, seed=0, progress=SILENT, title="")
    for history, items, scores in zip(histories, pairs.items, pairs.scores, strict=True):
        ids = dataset.item_ids[history[history >= 0]].tolist()
        query = Query(k=N, params=SearchParams(policy="exhaustive"), history=ids)
        exact = engine.search([engine.check(query)], 0)[0]
        by_item = dict(zip(exact.item_ids, exact.scores, strict=True))
        np.testing.assert_allclose([by_item[i] for i in dataset.item_ids[items].tolist()], scores, atol=1e-5)
        assert dataset.item_ids[items[: pairs.n_best]].tolist() == list(exact.item_ids)


# -- the student -----------------------------------------------------------------------------------


def random_tables(n: int, *, dim: int, context_dim: int) -> LearnedTables:
    rng = np.random.default_rng(4)
    keys, queries = rng.normal(size=(2, n, 1 + dim + context_dim)).astype(np.float16)
    return LearnedTables(keys, queries, dim)


def test_tables_that_are_right_measure_as_right() -> None:
    tables = random_tables(3000, dim=3, context_dim=2)
    histories = np.array([[5, 9, -1], [7, -1, -1]], np.int32)
    items = np.stack(
        [np.argsort(-tables.estimate(h[h >= 0], slice(None)))[:400].astype(np.int32) for h in histories]
    )
    scores = np.stack([tables.estimate(h[h >= 0], i) for h, i in zip(histories, items, strict=True)])
    quality = measure(tables, Pairs(histories, items, scores, 300))
    assert (quality.rmse, quality.coverage, quality.users) == (0.0, 1.0, 2)
    assert quality.correlation == pytest.approx(1.0)
    shifted = measure(tables, Pairs(histories, items, scores + 2, 300))
    assert shifted.rmse == pytest.approx(2.0) and shifted.correlation == pytest.approx(1.0)
    opposite = measure(tables, Pairs(histories, items[:, ::-1].copy(), scores, 300))
    assert opposite.correlation < 0


def test_it_is_trained_by_the_formula_that_is_stored() -> None:
    """The squared error of a step, of which padding must be no part, is that of the tables before it."""
    features = ItemFeatures(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), None)
    student = Student(features.width, dim=3, context_dim=2, seed=1)
    tables = student.tables(features, 40)
    histories = np.array([[3, 8, -1, -1], [12, 1, 30, 7]], np.int32)
    items = np.array([[2, 5, 9], [10, 11, 39]], np.int32)
    present = histories >= 0
    squared = student.train_on(
        features(np.where(present, histories, 0)),
        present,
        features(items),
        np.zeros((2, 3), np.float32),
        0.1,
        1,
    )
    expected = [tables.estimate(h[h >= 0], i) for h, i in zip(histories, items, strict=True)]
    assert float(squared) == pytest.approx(np.mean(np.square(expected)), rel=1e-2)  # tables: half precision
    assert not np.array_equal(student.tables(features, 40).queries, tables.queries)


def test_features_are_standardised_and_a_constant_one_is_zero() -> None:
    rows = np.random.default_rng(0).normal(5, 3, (50, 4)).astype(np.float32)
    rows[:, 2] = 7
    features = ItemFeatures(rows, lambda items: np.ones((len(items), 2), np.float32))
    seen = features(np.arange(50, dtype=np.int32).reshape(5, 10)).reshape(50, -1)
    assert features.width == seen.shape[1] == 6
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(axis=0), [1, 1, 0, 1, 0, 0], atol=1e-5)


def test_what_does_not_fit_half_precision_is_clipped() -> None:
    features = ItemFeatures(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), None)
    student = Student(features.width, dim=2, context_dim=0, seed=0)
    for weight in student._weights.values():
        weight.assign(weight * 1e6)
    assert np.isfinite(student.tables(features, 8).keys).all()
