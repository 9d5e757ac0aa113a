"""What the student sees of an item: its embedding, and the model's own input where the run has the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from nann.engine.artifacts import Artifact
from nann.offline.checkpoints import WEIGHTS_FILE, load_model
from nann.offline.data.dataset import Dataset

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["ItemFeatures", "input_rows"]

_SAMPLE = 65_536  # items whose mean and deviation stand for those of all


class ItemFeatures:
    """Standardised features by item index, computed when asked for: nothing is held but the embeddings."""

    def __init__(self, embeddings: Float32[np.ndarray, "N D"], inputs: Any | None) -> None:
        """`inputs`: item indices [n] -> the model's input rows [n, input_dim], or None."""
        self._embeddings, self._inputs = embeddings, inputs
        n = len(embeddings)
        sample = self._raw(np.arange(0, n, max(n // _SAMPLE, 1), dtype=np.int32))
        self._mean: Float32[np.ndarray, " width"] = sample.mean(axis=0)
        deviation = sample.std(axis=0)
        # A number that is the same for all items says nothing: it becomes zero.
        self._scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-6), 0).astype(np.float32)
        self.width: int = sample.shape[1]

    def __call__(self, items: Int32[np.ndarray, "..."]) -> Float32[np.ndarray, "... width"]:
        unique, inverse = np.unique(items, return_inverse=True)
        rows: Float32[np.ndarray, "n width"] = (self._raw(unique) - self._mean) * self._scale
        return np.asarray(rows[inverse.reshape(items.shape)])

    def _raw(self, items: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n width"]:
        rows: Float32[np.ndarray, "n width"] = np.asarray(self._embeddings[items], np.float32)
        if self._inputs is None:
            return rows
        return np.concatenate([rows, self._inputs(items)], axis=1)


def input_rows(model_dir: Path, dataset: Dataset, artifact: Artifact) -> Any | None:
    """The model's input rows by item index; None where the run holds no model trained here.

    Raises:
        ModelNotTrainedError: the directory is a model's, but a part is missing or does not fit.
        ValueError: it is another model than the artifact's.
    """
    if not (model_dir / WEIGHTS_FILE).is_file():
        return None
    model, _ = load_model(model_dir)
    serving = model.fold(np.asarray(dataset.item_categories))
    read = tf.function(serving.inputs_of, input_signature=[tf.TensorSpec([None], tf.int32)])

    def inputs(items: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n input_dim"]:
        rows: Float32[np.ndarray, "n input_dim"] = read(tf.constant(items, tf.int32)).numpy()
        return rows

    some = np.arange(0, artifact.num_items, max(artifact.num_items // 1000, 1), dtype=np.int32)
    if artifact.input_rows is not None and artifact.input_rows.recognise(inputs(some))[1]:
        raise ValueError(
            f"{model_dir} is not the model of {artifact.directory}: it was trained again since; "
            "run nann extract and nann index again"
        )
    return inputs
