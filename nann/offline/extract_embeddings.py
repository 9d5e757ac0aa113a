"""From a trained model to everything of the artifact that comes from model and data (not the graph)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import tensorflow as tf

from nann.engine.input_rows import InputRows, hash_rows
from nann.offline.checkpoints import load_model, write_json
from nann.offline.data import rules
from nann.offline.data.dataset import Dataset
from nann.offline.models.model import ServingModel
from nann.offline.progress import Progress

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64

__all__ = [
    "HISTORY_LIMIT",
    "N_START_POINTS",
    "DataMismatchError",
    "ExtractReport",
    "extract",
    "histories_without_targets",
    "save_serving_model",
]

HISTORY_LIMIT = 200  # items kept of each user's history
N_START_POINTS = 200  # popular items a search may start from (reference/search-findings.md)
ITEMS_PER_CALL = 16_384


class DataMismatchError(Exception):
    """The data set is not the one that the model was trained on."""


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was written, and how long it took."""

    output_dir: Path
    num_items: int
    embedding_dim: int
    user_tensors: Mapping[str, tuple[int, ...]]
    item_tensors: Mapping[str, tuple[int, ...]]
    seconds: float


def extract(
    model_dir: Path | str,
    output_dir: Path | str,
    data_dir: Path | str | None = None,
    *,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write SavedModel, item embeddings, item-only state, start points and histories to `output_dir`.

    `data_dir` defaults to the directory the model was trained on. The directory appears whole: it is
    written beside `output_dir`, which it then replaces. Raises ModelNotTrainedError, NotPreparedError,
    and DataMismatchError when the data set is another than the one trained on.
    """
    started = time.perf_counter()
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    model, config = load_model(model_dir)
    dataset = Dataset.load(Path(config["data_dir"] if data_dir is None else data_dir))
    if dataset.meta.data_hash != config["data_hash"]:
        raise DataMismatchError(
            f"{dataset.directory} has data hash {dataset.meta.data_hash}, but {model_dir} was trained on "
            f"{config['data_hash']}; pass the data set it was trained on, or train again"
        )
    serving = model.fold(np.asarray(dataset.item_categories))
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with progress if progress is not None else Progress() as shown:
        with shown.stage("save model"):
            save_serving_model(serving, partial)
        arrays = partial / "arrays"
        arrays.mkdir()
        with shown.stage("embed items", total=dataset.num_items, unit="items") as stage:
            _write_items(serving, partial, stage.advance)
        with shown.stage("write histories"):
            _write_data(dataset, partial)
    _write_model_json(serving, config, partial)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial.rename(output_dir)
    return ExtractReport(
        output_dir=output_dir,
        num_items=dataset.num_items,
        embedding_dim=serving.spec.embedding_dim,
        user_tensors=dict(serving.user_shapes),
        item_tensors=dict(serving.item_shapes),
        seconds=time.perf_counter() - started,
    )


def save_serving_model(serving: ServingModel, directory: Path) -> None:
    """Write a SavedModel with the signatures of design.md; it runs without keras and without this package.

    Signature functions are named after their signature: the name is part of XLA's cache key.
    """
    spec = serving.spec
    user = {
        name: tf.TensorSpec([None, *shape], tf.float32, name=name)
        for name, shape in serving.user_shapes.items()
    }
    item = {
        name: tf.TensorSpec([None, None, *shape], tf.float32, name=name)
        for name, shape in serving.item_shapes.items()
    }

    def encode_user(history: Any) -> dict[str, Any]:
        return serving.encode_user(history)

    def encode_user_comm_seq(comm_seq: Any) -> dict[str, Any]:
        return serving.encode_user_comm_seq(comm_seq)

    def encode_items(item_index: Any) -> dict[str, Any]:
        return serving.encode_items(item_index)

    def score(**tensors: Any) -> dict[str, Any]:
        users = {name: tensors[name] for name in user}
        return {"score": serving.score(users, {name: tensors[name] for name in item})}

    history = tf.TensorSpec([None, spec.history_length], tf.int32, name="history")
    comm_seq = tf.TensorSpec([None, spec.history_length * spec.input_dim], tf.float32, name="comm_seq")
    item_index = tf.TensorSpec([None], tf.int32, name="item_index")
    signatures = {
        "encode_user": tf.function(encode_user, autograph=False).get_concrete_function(history),
        "encode_user_comm_seq": tf.function(encode_user_comm_seq, autograph=False).get_concrete_function(
            comm_seq
        ),
        "encode_items": tf.function(encode_items, autograph=False).get_concrete_function(item_index),
        "score": tf.function(score, autograph=False).get_concrete_function(**user, **item),
    }
    tf.saved_model.save(serving, str(directory), signatures=signatures)


def histories_without_targets(
    dataset: Dataset, limit: int = HISTORY_LIMIT
) -> tuple[Int64[np.ndarray, " users+1"], Int32[np.ndarray, " kept"]]:
    """Every user's newest `limit` items, oldest first, as (row splits, items).

    Of validation and test users only what came before their held-out target, so that a search by user id
    is asked the question that the evaluation asks.
    """
    lengths = np.diff(dataset.user_row_splits)
    held_out = np.isin(dataset.user_split, (rules.VALIDATION, rules.TEST))
    ends = np.where(held_out, rules.eval_position(lengths), lengths)
    kept = np.minimum(ends, limit)
    row_splits = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    first = dataset.user_row_splits[:-1] + ends - kept
    source = np.arange(row_splits[-1]) + np.repeat(first - row_splits[:-1], kept)
    return row_splits, np.asarray(dataset.user_items[source], np.int32)


def _write_items(serving: ServingModel, directory: Path, advance: Callable[[int], None]) -> None:
    """`item_embs.npy`, one half-precision array for each item tensor, and the hashes of the input rows."""
    n_items = serving.spec.num_items
    embeddings: np.ndarray = np.empty((n_items, serving.spec.embedding_dim), np.float32)
    states: dict[str, np.ndarray] = {
        name: np.empty((n_items, *shape), np.float16) for name, shape in serving.item_shapes.items()
    }
    hashes: np.ndarray = np.empty(n_items, np.uint64)
    for start in range(0, n_items, ITEMS_PER_CALL):
        index = np.arange(start, min(start + ITEMS_PER_CALL, n_items), dtype=np.int32)
        rows = slice(start, start + len(index))
        embeddings[rows] = serving.embed_items(tf.constant(index)).numpy()
        hashes[rows] = hash_rows(serving.inputs_of(tf.constant(index)).numpy())
        for name, tensor in serving.encode_items(tf.constant(index)).items():
            states[name][rows] = tensor.numpy()
        advance(len(index))
    for name, array in {"item_embs": embeddings, **states}.items():
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).reshape(n_items, -1).any(axis=1).sum())
            raise ValueError(f"{name} of {bad} items does not fit {array.dtype}: the model has diverged")
    np.save(directory / "item_embs.npy", embeddings)
    for name, array in states.items():
        np.save(directory / "arrays" / f"item_state_{name}.npy", array)
    input_rows = InputRows.of(hashes)
    np.save(directory / "arrays" / "input_row_hashes.npy", input_rows.hashes)
    np.save(directory / "arrays" / "input_row_items.npy", input_rows.items)


def _write_data(dataset: Dataset, directory: Path) -> None:
    """Ids, weights, start points, histories and attributes."""
    arrays = directory / "arrays"
    if dataset.meta.id_type.item == "int":
        np.save(directory / "item_ids.npy", np.asarray(dataset.item_ids, np.int64))
    else:
        _write_strings(directory / "item_ids.parquet", "item_id", dataset.item_ids)
    np.save(arrays / "item_weights.npy", np.asarray(dataset.item_weights, np.float32))
    np.save(arrays / "start_points.npy", dataset.popular_items(N_START_POINTS))
    row_splits, items = histories_without_targets(dataset)
    if dataset.meta.id_type.user == "int":
        np.save(arrays / "history_ids.npy", np.asarray(dataset.user_ids, np.int64))
    else:
        _write_strings(arrays / "history_id_strings.parquet", "user_id", dataset.user_ids)
    np.save(arrays / "history_row_splits.npy", row_splits)
    np.save(arrays / "history_items.npy", items)
    shutil.copyfile(dataset.directory / "items.parquet", arrays / "items.parquet")


def _write_strings(path: Path, column: str, values: np.ndarray) -> None:
    pl.DataFrame({column: pl.Series(values.tolist(), dtype=pl.String)}).write_parquet(path)


def _write_model_json(serving: ServingModel, config: dict[str, Any], directory: Path) -> None:
    def described(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {name: {"shape": list(shape), "dtype": "float32"} for name, shape in sorted(shapes.items())}

    kept = ("step", "total_steps", "best_step", "validation", "collapsed_at_step")
    write_json(
        directory / "model.json",
        {
            "model": config["model"],
            "num_items": serving.spec.num_items,
            "history_length": serving.spec.history_length,
            "input_dim": serving.spec.input_dim,
            "embedding_dim": serving.spec.embedding_dim,
            "user_tensors": described(serving.user_shapes),
            "item_tensors": described(serving.item_shapes),
            "training": {**config["training"], **{name: config[name] for name in kept}},
            "data_hash": config["data_hash"],
            "seeds": {"training": config["training"]["seed"]},
        },
    )
