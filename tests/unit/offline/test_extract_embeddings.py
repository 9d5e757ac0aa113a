"""What extraction writes, and that the SavedModel stands on its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from nann.engine.input_rows import InputRows
from nann.offline.checkpoints import ModelNotTrainedError, load_model
from nann.offline.data import rules
from nann.offline.data.dataset import Dataset
from nann.offline.extract_embeddings import DataMismatchError, extract, histories_without_targets
from nann.offline.models.model import ServingModel
from nann.offline.models.registry import MODELS
from nann.offline.progress import Progress
from nann.offline.train import TrainConfig, train

SILENT = Progress(silent=True)
SIGNATURES = {"encode_user", "encode_user_comm_seq", "encode_items", "score"}


def trained(data: Path, directory: Path, model: str = "dnn") -> Path:
    config = TrainConfig(
        model=model, batch_size=32, num_neg=20, negative_groups=2, adv_groups=1, max_steps=3, jit=False
    )
    train(data, directory, config, progress=SILENT)
    return directory


def serving_of(model_dir: Path, data: Path) -> ServingModel:
    model, _ = load_model(model_dir)
    return model.fold(np.asarray(Dataset.load(data).item_categories))


@pytest.fixture(params=sorted(MODELS))
def run(request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path) -> Path:
    """A run directory with model/ and embeddings/."""
    extract(trained(tiny_data, tmp_path / "model", request.param), tmp_path / "embeddings", progress=SILENT)
    return tmp_path


def test_saved_model_gives_what_the_model_gives(run: Path, tiny_data: Path) -> None:
    serving = serving_of(run / "model", tiny_data)
    loaded = tf.saved_model.load(str(run / "embeddings"))
    assert set(loaded.signatures) == SIGNATURES
    _, histories, _ = Dataset.load(tiny_data).eval_samples("test")
    user = loaded.signatures["encode_user"](history=tf.constant(histories))
    item = loaded.signatures["encode_items"](item_index=tf.range(60, dtype=tf.int32))
    tiled = {n: tf.tile(t[None], [len(histories)] + [1] * t.shape.rank) for n, t in item.items()}
    score = loaded.signatures["score"](**user, **tiled)["score"].numpy()
    assert score.shape == (len(histories), 60)
    expected = serving.score(
        serving.encode_user(tf.constant(histories)),
        {n: t[None] for n, t in serving.encode_items(tf.range(60, dtype=tf.int32)).items()},
    ).numpy()
    np.testing.assert_allclose(score, expected, atol=1e-5)
    comm_seq = serving.inputs_of(tf.constant(histories)).numpy().reshape(len(histories), -1)
    again = loaded.signatures["encode_user_comm_seq"](comm_seq=tf.constant(comm_seq))
    for name, tensor in user.items():
        np.testing.assert_array_equal(tensor.numpy(), again[name].numpy(), err_msg=name)


def test_arrays_are_the_models(run: Path, tiny_data: Path) -> None:
    serving, dataset = serving_of(run / "model", tiny_data), Dataset.load(tiny_data)
    out = run / "embeddings"
    index = tf.range(60, dtype=tf.int32)
    embeddings = np.load(out / "item_embs.npy")
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, serving.embed_items(index).numpy(), atol=1e-6)
    np.testing.assert_array_equal(np.load(out / "item_ids.npy"), dataset.item_ids)
    for name, tensor in serving.encode_items(index).items():
        state = np.load(out / "arrays" / f"item_state_{name}.npy")
        assert state.dtype == np.float16
        np.testing.assert_allclose(state, tensor.numpy(), rtol=1e-3, atol=1e-3)
    inputs = serving.inputs_of(index).numpy().astype(np.float16)
    table = InputRows(*(np.load(out / "arrays" / f"input_row_{name}.npy") for name in ("hashes", "items")))
    assert (table.hashes.dtype, table.items.dtype) == (np.uint64, np.int32)
    assert table.recognise(inputs)[0].tolist() == index.numpy().tolist()
    start_points = np.load(out / "arrays" / "start_points.npy")
    assert start_points.dtype == np.int32
    assert (np.diff(dataset.item_weights[start_points]) <= 0).all()
    assert pl.read_parquet(out / "arrays" / "items.parquet").height == 60


def test_model_json_describes_the_tensors(run: Path, tiny_data: Path) -> None:
    described = json.loads((run / "embeddings" / "model.json").read_text())
    serving = serving_of(run / "model", tiny_data)
    assert described["item_tensors"] == {
        name: {"shape": list(shape), "dtype": "float32"} for name, shape in serving.item_shapes.items()
    }
    assert set(described["user_tensors"]) == set(serving.user_shapes)
    sizes = {name: described[name] for name in ("history_length", "input_dim", "embedding_dim")}
    assert sizes == {"history_length": 50, "input_dim": 64, "embedding_dim": 64}
    assert described["data_hash"] == Dataset.load(tiny_data).meta.data_hash


def test_signature_functions_are_named_after_the_signatures(tiny_data: Path, tmp_path: Path) -> None:
    extract(trained(tiny_data, tmp_path / "model"), tmp_path / "embeddings", progress=SILENT)
    saved = SavedModel.FromString((tmp_path / "embeddings" / "saved_model.pb").read_bytes())
    library = saved.meta_graphs[0].graph_def.library.function
    names = [function.signature.name for function in library]
    for signature in SIGNATURES:
        assert any(re.fullmatch(f"__inference_{signature}_\\d+", name) for name in names), names


def test_saved_model_needs_no_model_classes(tiny_data: Path, tmp_path: Path) -> None:
    extract(trained(tiny_data, tmp_path / "model"), tmp_path / "embeddings", progress=SILENT)
    program = """
import sys
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
items = loaded.signatures["encode_items"](item_index=tf.constant([0, 1]))
print(items["item_hidden"].shape, "nann" in sys.modules, type(loaded).__module__.split(".")[0])
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "embeddings")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(2, 128) False tensorflow" in done.stdout  # not a Keras object either


def test_histories_of_held_out_users_end_before_their_target(tiny_data: Path) -> None:
    dataset = Dataset.load(tiny_data)
    row_splits, items = histories_without_targets(dataset, limit=20)
    for user in range(dataset.num_users):
        start, end = dataset.user_row_splits[user : user + 2]
        held_out = dataset.user_split[user] in (rules.VALIDATION, rules.TEST)
        until = start + 7 + (end - start - 7) // 2 if held_out else end
        expected = dataset.user_items[start:until][-20:]
        np.testing.assert_array_equal(items[row_splits[user] : row_splits[user + 1]], expected)
    assert set(np.unique(dataset.user_split)) == {rules.TRAIN, rules.VALIDATION, rules.TEST}


def test_another_data_set_is_refused(
    tiny_data: Path, tmp_path: Path, write_dataset: Callable[..., Path]
) -> None:
    model_dir = trained(tiny_data, tmp_path / "model")
    other = write_dataset(tmp_path / "other", seed=9)
    with pytest.raises(DataMismatchError, match="data hash"):
        extract(model_dir, tmp_path / "embeddings", other, progress=SILENT)
    assert not (tmp_path / "embeddings").exists()


def test_an_untrained_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotTrainedError, match=r"config\.json is missing"):
        extract(tmp_path, tmp_path / "embeddings", progress=SILENT)


def test_extraction_replaces_an_older_one(tiny_data: Path, tmp_path: Path) -> None:
    model_dir = trained(tiny_data, tmp_path / "model")
    extract(model_dir, tmp_path / "embeddings", progress=SILENT)
    (tmp_path / "embeddings" / "stale.npy").touch()
    extract(model_dir, tmp_path / "embeddings", progress=SILENT)
    assert not (tmp_path / "embeddings" / "stale.npy").exists()
    assert not (tmp_path / "embeddings.partial").exists()
