"""The SavedModel as XLA programs: which are written, and where their weights lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_world import make_world
from tiny_models import TinyModel, make_model_world, publish, publish_programs, real_model

from nann.engine.artifacts import Artifact, read_manifest
from nann.engine.scoring.programs import ProgramFile, read_weights
from nann.offline.export import export
from nann.offline.export_programs import PROGRAM_SETS, GridOptions, export_programs
from nann.offline.progress import Progress

SMALL = GridOptions(max_batch=4, max_rows=128, tile_rows=32, wide=True, crossed=True)
VARIABLES = "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, TinyModel]:
    directory = tmp_path_factory.mktemp("programs") / "index"
    return directory, make_model_world(directory, num_items=64)


@pytest.fixture(scope="module")
def published(world, tmp_path_factory) -> Path:
    import shutil

    directory = Path(shutil.copytree(world[0], tmp_path_factory.mktemp("published") / "1"))
    publish_programs(directory, max_rows=128)
    return directory


def test_every_shape_has_its_program(published) -> None:
    found = read_manifest(published).programs.sets["cpu"]
    encoders = [f"{name}-{batch}" for name in ("encode_user", "encode_user_comm_seq") for batch in (1, 2, 4)]
    wide = [f"score-1x{rows}" for rows in (64, 96, 128)]
    tiled = [f"score-{tiles}x32" for tiles in (2, 3, 4)]
    assert list(found.programs) == [*encoders, *wide, *tiled, "score_crossed-32"]
    file = ProgramFile(published / found.file)
    assert all(name in file for name in found.programs)
    assert (found.max_batch, found.max_rows, found.tile_rows, found.wide, found.crossed_rows) == (
        4,
        128,
        32,
        True,
        32,
    )


def test_arguments_are_named_in_their_order(world, published) -> None:
    _, model = world
    arguments = read_manifest(published).programs.sets["cpu"].arguments
    users, items = sorted(model.user_shapes), sorted(model.item_shapes)
    assert arguments["encode_user"][0] == "history"
    assert arguments["encode_user_comm_seq"][0] == "comm_seq"
    assert list(arguments["score"][: len(users) + 1 + len(items)]) == [*users, "tile_query", *items]
    assert list(arguments["score_crossed"][: len(users) + len(items)]) == [*users, *items]
    assert arguments["score"][-2:] == arguments["score_crossed"][-2:]
    weights = read_manifest(published).programs.weights
    for names in arguments.values():
        assert {name for name in names if name.startswith("weight/")} <= set(weights)


def test_weights_stay_in_the_saved_model(world, published) -> None:
    _, model = world
    manifest = read_manifest(published)
    assert sorted(path.name for path in (published / "programs").iterdir()) == ["cpu.zip"]
    assert {spec.file for spec in manifest.programs.weights.values()} == {VARIABLES}
    values = read_weights(published, manifest.programs.weights)
    variables = [variable.numpy() for variable in model.module.variables]
    assert 0 < len(values) <= len(variables)  # what only encodes items is not needed
    for value in values.values():
        assert any(value.shape == v.shape and np.array_equal(value, v) for v in variables)
    largest = max(variable.nbytes for variable in variables)
    assert largest == model.module.table.numpy().nbytes


def test_a_table_is_no_part_of_the_programs(published) -> None:
    """Else a corpus of millions would be copied into each of a hundred programs."""
    file = ProgramFile(published / "programs" / "cpu.zip")
    manifest = read_manifest(published)
    for name, value in read_weights(published, manifest.programs.weights).items():
        if value.nbytes >= 64:
            assert not any(
                value.tobytes() in file.module(p) for p in manifest.programs.sets["cpu"].programs
            ), name


def test_constants_and_weights_stored_otherwise_lie_beside_the_programs(tmp_path) -> None:
    """A model may hold constants that are no variables, and its variables may lie in other files."""
    import tensorflow as tf

    directory = tmp_path / "1"
    model = make_model_world(directory, num_items=64)
    shift = np.arange(8, dtype=np.float32) * 0.1
    module, score = model.module, model.module.score
    offset = tf.constant(shift)  # captured: made outside of the function

    def shifted(**tensors):
        return {"score": score(**tensors)["score"] + offset[0] + tf.reduce_sum(offset)}

    module.score = shifted
    publish(model, directory)
    manifest = publish_programs(directory)
    weights = manifest.programs.weights
    elsewhere = {name: spec for name, spec in weights.items() if spec.file != VARIABLES}
    assert len(elsewhere) == 1
    for name, spec in elsewhere.items():
        assert spec.file.startswith("programs/weight-")
        assert spec.file in manifest.files
        assert np.array_equal(read_weights(directory, {name: spec})[name], shift)
    (directory / VARIABLES).rename(directory / "moved")
    from nann.offline.export_programs import _Bytes

    with _Bytes(directory / VARIABLES) as none:
        assert none.find(shift) == -1


def test_a_score_that_does_not_broadcast_has_no_crossed_program(tmp_path) -> None:
    import tensorflow as tf

    directory = tmp_path / "1"
    model = make_model_world(directory, num_items=64)
    score = model.module.score

    def strict(**tensors):
        users = tf.shape(tensors["user_keys"])[0]
        items = tensors["item_query"]
        return score(**{**tensors, "item_query": tf.reshape(items, [users, -1, items.shape[-1]])})

    model.module.score = strict
    publish(model, directory)
    found = publish_programs(directory).programs.sets["cpu"]
    assert found.crossed_rows is None
    assert "score_crossed" not in found.arguments


@pytest.mark.parametrize("name", ["attention_dnn", "dnn", "two_sided"])
def test_every_model_of_the_registry_scores_crossed(tmp_path, name) -> None:
    directory = tmp_path / "1"
    make_world(directory, num_items=90)
    publish(real_model(name, 90), directory)
    assert publish_programs(directory).programs.sets["cpu"].crossed_rows == 32


def test_a_manifest_of_another_model_is_refused(world, tmp_path) -> None:
    import shutil

    directory = Path(shutil.copytree(world[0], tmp_path / "1"))
    manifest = read_manifest(directory)
    wrong = manifest.model_copy(update={"history_length": manifest.history_length + 1})
    with pytest.raises(ValueError, match="gives no cpu programs"):
        export_programs(directory, wrong, {"cpu": SMALL}, progress=Progress(silent=True))


def test_what_is_no_saved_model_is_refused(tmp_path, world) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"a graph")
    with pytest.raises(ValueError, match="holds no SavedModel"):
        export_programs(tmp_path, read_manifest(world[0]), {"cpu": SMALL}, progress=Progress(silent=True))


def test_the_gpu_set_is_tiled_and_scores_many_pairs_a_call() -> None:
    grid = PROGRAM_SETS["gpu"].grid(crossed=True)
    shapes = list(grid.shapes())
    assert {shape.rows for shape in shapes} == {64}
    assert (shapes[0].tiles, shapes[-1].pairs, grid.crossed_rows) == (4, 131072, 2048)
    assert PROGRAM_SETS["cpu"].grid(crossed=False).crossed_rows is None


# -- nann export -------------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path) -> Path:
    import shutil

    shutil.copytree(world[0], tmp_path / "run" / "index")
    return tmp_path / "run"


def test_export_publishes_programs_with_the_version(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(PROGRAM_SETS, "cpu", SMALL)  # type: ignore[arg-type]
    path = export(run, tmp_path / "repository", programs=["cpu"], progress=Progress(silent=True))
    manifest = Artifact.open(path, verify="full").manifest
    assert list(manifest.programs.sets) == ["cpu"]
    assert manifest.programs.sets["cpu"].file in manifest.files
    assert not (run / "index" / "programs").exists()
    assert set(read_manifest(run / "index").files) < set(manifest.files)


def test_export_takes_another_largest_batch(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(PROGRAM_SETS, "cpu", SMALL)  # type: ignore[arg-type]
    path = export(run, tmp_path / "repository", programs=["cpu"], max_batch=2, progress=Progress(silent=True))
    found = read_manifest(path).programs.sets["cpu"]
    assert found.max_batch == 2
    assert found.crossed_rows == 64
    assert "encode_user-4" not in found.programs


def test_export_without_programs_leaves_none(run, tmp_path) -> None:
    path = export(run, tmp_path / "repository", programs=[])
    assert read_manifest(path).programs is None
    assert not (path / "programs").exists()


def test_a_model_that_cannot_be_lowered_publishes_nothing(run, tmp_path) -> None:
    (run / "index" / "saved_model.pb").write_bytes(b"a graph")
    with pytest.raises(ValueError, match="holds no SavedModel"):
        export(run, tmp_path / "repository", progress=Progress(silent=True))
    assert list((tmp_path / "repository" / "nann").iterdir()) == []
