"""The attention model with weights made by hand, as a module that is saved like a trained one.

`nann/offline/benchmark/gpu/model.py` says how the weights make a landscape; what it computes in NumPy is
here in TensorFlow, in the folded form of `nann/offline/models/attention_dnn.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from nann.offline.benchmark.gpu.corpus import DIM, HISTORY_LENGTH
from nann.offline.benchmark.gpu.model import HIDDEN_UNITS, SCORE_UNITS, Weights
from nann.offline.models.layers import prelu

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32

__all__ = ["ConstructedAttention"]


class ConstructedAttention(tf.Module):  # type: ignore[misc]
    """What `save_serving_model` saves: shapes of user and item tensors, and the four functions."""

    user_shapes: Mapping[str, tuple[int, ...]]
    item_shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, weights: Weights, embeddings: Float32[np.ndarray, "N 64"]) -> None:
        super().__init__(name="constructed_attention")
        self.spec = SimpleNamespace(
            num_items=len(embeddings), history_length=HISTORY_LENGTH, input_dim=DIM, embedding_dim=DIM
        )
        self.user_shapes = {
            "user_key_bias": (1, HISTORY_LENGTH),
            "user_keys": (HIDDEN_UNITS, HISTORY_LENGTH),
            "user_values": (HISTORY_LENGTH, SCORE_UNITS[0]),
        }
        self.item_shapes = {"item_hidden": (SCORE_UNITS[0],), "item_query": (HIDDEN_UNITS,)}
        self.embeddings = tf.Variable(embeddings, trainable=False, name="embeddings")
        self.weights = {
            name: tf.Variable(array, trainable=False, name=name) for name, array in weights.arrays().items()
        }

    def encode_user(self, history: Any) -> dict[str, Any]:
        """Histories int32 [B, 50], -1 padded -> user tensors."""
        rows = tf.gather(self.embeddings, tf.maximum(history, 0))
        return self._encode(tf.where(history[..., None] >= 0, rows, tf.zeros_like(rows)))

    def encode_user_comm_seq(self, comm_seq: Any) -> dict[str, Any]:
        """Embedded histories float32 [B, 3200] -> user tensors."""
        return self._encode(tf.reshape(comm_seq, [-1, HISTORY_LENGTH, DIM]))

    def encode_items(self, item_index: Any) -> dict[str, Any]:
        """Item indices int32 [n] -> item tensors."""
        w, inputs = self.weights, tf.gather(self.embeddings, item_index)
        return {
            "item_hidden": tf.matmul(inputs, w["item_kernel"]) + w["item_bias"],
            "item_query": prelu(tf.matmul(inputs, w["query_kernel"]) + w["query_bias"], w["query_slope"]),
        }

    def score(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """User tensors [B, ...] × item tensors [B or 1, C, ...] -> scores [B, C]."""
        w = self.weights
        logits = tf.matmul(item["item_query"], user["user_keys"]) + user["user_key_bias"]
        hidden = tf.matmul(tf.nn.softmax(logits), user["user_values"]) + item["item_hidden"]
        hidden = prelu(hidden, w["slope_1"])
        hidden = prelu(tf.tensordot(hidden, w["kernel_2"], 1) + w["bias_2"], w["slope_2"])
        hidden = prelu(tf.tensordot(hidden, w["kernel_3"], 1) + w["bias_3"], w["slope_3"])
        # A product with one column would round by the shape it is in (docs/adr/0004-scoring-shapes.md).
        return tf.reduce_sum(hidden * w["kernel_4"], axis=-1)

    def _encode(self, inputs: Any) -> dict[str, Any]:
        w = self.weights
        hidden = prelu(tf.tensordot(inputs, w["history_kernel"], 1) + w["history_bias"], w["history_slope"])
        return {
            "user_key_bias": tf.linalg.matvec(hidden, w["key_bias_kernel"])[..., None, :],
            "user_keys": tf.linalg.matrix_transpose(tf.tensordot(hidden, w["key_kernel"], 1)),
            "user_values": tf.tensordot(inputs, w["value_kernel"], 1),
        }
