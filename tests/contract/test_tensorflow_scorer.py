"""What only the TensorFlow scorer can get wrong: SavedModel, manifest, memory, TensorFlow's errors."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import edit_manifest
from engine_world import make_world
from tiny_models import TinyModel, integer_dot, make_model_world, publish

from nann.engine.artifacts import read_manifest
from nann.engine.backend import Tiles
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

N = 64
GRID = BucketGrid(max_batch=3, max_rows=64)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, TinyModel]:
    directory = tmp_path_factory.mktemp("tensorflow") / "1"
    return directory, make_model_world(directory, num_items=N)


@pytest.fixture
def version(published, tmp_path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "1"))


def load(directory: Path) -> TensorFlowScorer:
    return TensorFlowScorer(directory, read_manifest(directory), max_batch=3, grid=GRID)


@pytest.fixture(scope="module")
def scorer(published) -> TensorFlowScorer:
    return load(published[0])


def tiles(model: TinyModel, rows: int = 64) -> Tiles:
    items = {name: table[np.arange(rows) % N][None] for name, table in model.item_state().items()}
    return Tiles(Shape(1, rows), np.zeros(1, np.int32), items)


def test_scores_are_the_models_own(published, scorer) -> None:
    """The engine's gathering, casting and padding around the model change nothing."""
    _, model = published
    history = np.array([[3, 1, 4, 1, -1, -1], [9, -1, -1, -1, -1, -1]], np.int32)
    users = scorer.encode_history(history)
    direct = model.module.encode_user(history)
    state = {name: table.astype(np.float32)[None] for name, table in model.item_state().items()}
    for b in range(2):
        wanted = model.module.score(**{n: t[b : b + 1] for n, t in direct.items()}, **state)["score"][0]
        given = tiles(model)
        found = scorer.score(users, Tiles(given.shape, np.array([b], np.int32), given.items))[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_user_tensors_are_padded_to_the_largest_batch_with_zeros(published, scorer, batch) -> None:
    _, model = published
    users = scorer.encode_history(np.full((batch, model.history_length), 5, np.int32))
    names = sorted(model.user_shapes)
    assert [tuple(t.shape) for t in users] == [(3, *model.user_shapes[name]) for name in names]
    for tensor in users:
        assert np.abs(tensor.numpy()[:batch]).sum() > 0
        assert (tensor.numpy()[batch:] == 0).all()


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_a_damaged_saved_model_is_an_artifact_error(version, damage) -> None:
    path = version / "saved_model.pb"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"\xff" * 99, "truncated": content[: len(content) // 2]}[damage]
        )
    with pytest.raises(ArtifactError, match=r"saved_model\.pb: expected a SavedModel"):
        load(version)


@pytest.mark.parametrize("file", ["variables.index", "variables.data-00000-of-00001"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_damaged_variables_are_an_artifact_error(version, file, damage) -> None:
    path = version / "variables" / file
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="expected a SavedModel"):
        load(version)


def test_a_missing_signature_is_named(version) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.encode_user = tf.function(lambda history: {"user_x": history}, autograph=False)
    signature = module.encode_user.get_concrete_function(tf.TensorSpec([None, 6], tf.int32, name="history"))
    shutil.rmtree(version / "variables")
    tf.saved_model.save(module, str(version), signatures={"encode_user": signature})
    with pytest.raises(ArtifactError, match=r"found no encode_items, score"):
        load(version)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(history_length=raw["history_length"] + 1),
        lambda raw: raw.update(input_dim=raw["input_dim"] + 1),
        lambda raw: raw["user_tensors"].update(user_extra={"shape": [4], "dtype": "float32"}),
        lambda raw: raw["user_tensors"].pop("user_keys"),
        lambda raw: raw["item_tensors"].pop("item_query"),
        lambda raw: raw["item_tensors"].update(item_extra={"shape": [4], "dtype": "float16"}),
        lambda raw: raw["item_tensors"]["item_query"].update(shape=[7]),
        lambda raw: raw["user_tensors"]["user_keys"].update(shape=[7, 7]),
    ],
    ids=["length", "input_dim", "user+", "user-", "item-", "item+", "item shape", "user shape"],
)
def test_a_manifest_that_describes_another_model_is_an_artifact_error(version, change) -> None:
    edit_manifest(version, change)
    with pytest.raises(ArtifactError, match=r"saved_model\.pb: expected signatures"):
        load(version)


def test_a_model_without_comm_seq_says_so(published, scorer) -> None:
    _, model = published
    encoder, scorer._encode_comm_seq = scorer._encode_comm_seq, None
    try:
        with pytest.raises(Unsupported, match="comm_seq"):
            scorer.encode_comm_seq(np.zeros((1, model.history_length * model.input_dim), np.float32))
    finally:
        scorer._encode_comm_seq = encoder


def test_an_error_of_tensorflow_becomes_a_backend_error(published, scorer) -> None:
    import tensorflow as tf

    _, model = published
    score, encoder = scorer._score, scorer._encode_history

    def exhausted(*arguments: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory\nand more")

    users = scorer.encode_history(np.full((1, model.history_length), -1, np.int32))
    scorer._score = scorer._encode_history = exhausted
    try:
        with pytest.raises(BackendError, match=r"^the model failed: out of memory$"):
            scorer.score(users, tiles(model))
        with pytest.raises(BackendError, match="out of memory"):
            scorer.encode_history(np.full((1, model.history_length), -1, np.int32))
    finally:
        scorer._score, scorer._encode_history = score, encoder
    assert np.isfinite(scorer.score(users, tiles(model))).all()


def test_a_non_finite_model_fails_its_warm_up(published) -> None:
    scorer = load(published[0])
    scorer._score = lambda *_: type("Scores", (), {"numpy": lambda _: np.full((1, 64), np.nan)})()
    with pytest.raises(BackendError, match="not finite in shape"):
        scorer.warm_up()


def test_an_out_of_range_history_does_not_bring_the_process_down(published, scorer) -> None:
    """The engine resolves ids first, so this is its own bug; it must still not be a crash."""
    _, model = published
    scorer.encode_history(np.full((1, model.history_length), 10**6, np.int32))


def test_flags_of_the_operator_are_kept(monkeypatch) -> None:
    from nann.engine.scoring import tensorflow_scorer

    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    tensorflow_scorer._add_flag("XLA_FLAGS", "--a=1")
    tensorflow_scorer._add_flag("XLA_FLAGS", "--a=2")
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/nowhere --a=1"


@pytest.mark.parametrize("offset_bytes", [2, 8, 16, 32])
def test_item_tensors_may_start_anywhere_in_memory(tmp_path, offset_bytes) -> None:
    """XLA's programs for this model crash the process on an argument that is not aligned."""
    world = make_world(tmp_path / "1", num_items=N)
    model = integer_dot(world.item_vectors, history_length=6)
    publish(model, world.directory)
    scorer = load(world.directory)
    users = scorer.encode_history(np.array([[3, 1, 4, -1, -1, -1]], np.int32))
    table = model.item_state()["item_vector"]
    raw = np.zeros(table.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset_bytes
    moved = raw[start : start + table.nbytes].view(np.float16).reshape(1, *table.shape)
    moved[:] = table
    found = scorer.score(
        users, Tiles(Shape(1, moved.shape[1]), np.zeros(1, np.int32), {"item_vector": moved})
    )[0]
    vectors = world.item_vectors.astype(np.float32)
    assert found.tolist() == (vectors @ vectors[[3, 1, 4]].sum(axis=0)).tolist()


def test_versions_of_one_architecture_share_programs_and_nothing_else(tmp_path) -> None:
    """The second and third score by their own weights with the first's programs, and outlive it."""

    def version(name: str, num_items: int, seed: int) -> tuple[TensorFlowScorer, TinyModel]:
        directory = tmp_path / name
        model = make_model_world(directory, num_items=num_items, seed=seed)
        return load(directory), model

    def agrees(scorer: TensorFlowScorer, model: TinyModel) -> bool:
        history = np.array([[3, 1, 4, 1, -1, -1]], np.int32)
        given = tiles(model)
        state = {name: table[:N].astype(np.float32)[None] for name, table in model.item_state().items()}
        wanted = model.module.score(**model.module.encode_user(history), **state)["score"][0]
        found = scorer.score(
            scorer.encode_history(history), Tiles(given.shape, np.zeros(1, np.int32), given.items)
        )
        return bool(np.allclose(found[0], wanted, rtol=1e-4, atol=1e-5))

    first, _ = version("1", N, seed=11)
    second, second_model = version("2", N, seed=12)
    assert second._score.func.__self__ is first._score.func.__self__
    assert second._encode_history.func.__self__ is first._encode_history.func.__self__
    larger, larger_model = version("3", N + 1, seed=13)
    assert larger._score.func.__self__ is first._score.func.__self__
    assert larger._encode_history.func.__self__ is not first._encode_history.func.__self__
    assert agrees(second, second_model) and agrees(larger, larger_model)
    handle = first._weights[0].handle
    first.close()
    assert read(handle).shape == (0,)
    del first
    gc.collect()
    assert agrees(second, second_model) and agrees(larger, larger_model)


def read(handle) -> np.ndarray:
    import tensorflow as tf

    return tf.raw_ops.ReadVariableOp(
        resource=handle, dtype=handle._handle_data.shape_and_type[0].dtype
    ).numpy()


def test_what_a_graph_computes_decides_whether_its_program_is_shared() -> None:
    import tensorflow as tf

    from nann.engine.scoring.tensorflow_sharing import _text

    def traced(factor: float, variable: tf.Variable) -> str:
        inner = tf.function(lambda x: x * factor, autograph=False)
        outer = tf.function(lambda x: inner(x) + variable, autograph=False)
        return _text(outer.get_concrete_function(tf.TensorSpec([None], tf.float32)))

    one, other = tf.Variable(1.0), tf.Variable(2.0)
    assert traced(2.0, one) == traced(2.0, other)
    assert traced(2.0, one) != traced(3.0, one)
    assert traced(2.0, one) != traced(2.0, tf.Variable([1.0]))
