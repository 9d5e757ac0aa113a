"""NANN's deep model without attention: the mean of the history in place of the attention output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from typing_extensions import override

from nann.offline.models.layers import DenseBlock
from nann.offline.models.model import ModelSpec, RetrievalModel, ServingModel

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int32

__all__ = ["Dnn", "mean_of_present"]

SCORE_UNITS = (128, 64, 32)


def mean_of_present(history_inputs: Any) -> Any:
    """Mean over the positions that hold an item: [..., L, D] -> [..., D]; zeros for an empty history.

    A missing position is an all-zero row, so that item indices and NANN's `comm_seq` mean the same.
    """
    present = tf.reduce_any(tf.not_equal(history_inputs, 0.0), axis=-1, keepdims=True)
    count = tf.reduce_sum(tf.cast(present, history_inputs.dtype), axis=-2)
    return tf.reduce_sum(history_inputs, axis=-2) / tf.maximum(count, 1.0)


class Dnn(RetrievalModel):
    """concat(mean history, item embedding) through the four-layer score network."""

    def __init__(self, spec: ModelSpec, *, seed: int = 0) -> None:
        super().__init__(spec, name="dnn", seed=seed)
        first, second, third = SCORE_UNITS
        width = spec.input_dim + spec.embedding_dim
        self.score_1 = DenseBlock(width, first, norm=True, name="dnn_1", seed=seed + 14)
        self.score_2 = DenseBlock(first, second, norm=True, name="dnn_2", seed=seed + 15)
        self.score_3 = DenseBlock(second, third, norm=True, name="dnn_3", seed=seed + 16)
        self.score_4 = DenseBlock(third, 1, activate=False, use_bias=False, name="dnn_4", seed=seed + 17)

    @override
    def encode_history(self, history_inputs: Any, training: bool = False) -> dict[str, Any]:
        kernel = self.score_1.kernel[: self.spec.input_dim]
        return {"user_hidden": tf.tensordot(mean_of_present(history_inputs), kernel, 1)[..., None, :]}

    @override
    def pair_hidden(self, user: Mapping[str, Any], item_embeddings: Any) -> Any:
        kernel = self.score_1.kernel[self.spec.input_dim :]
        return user["user_hidden"] + tf.tensordot(item_embeddings, kernel, 1) + self.score_1.bias

    @override
    def tail(self, hidden: Any, training: bool = False) -> Any:
        outputs = self.score_1.finish(hidden, training)
        outputs = self.score_3(self.score_2(outputs, training=training), training=training)
        return tf.squeeze(self.score_4(outputs), -1)

    @override
    def fold(self, item_categories: Int32[np.ndarray, " items"]) -> ServingModel:
        return ServingDnn(self, item_categories)


class ServingDnn(ServingModel):
    """The folded form: both sides meet in the first hidden layer, before its PReLU."""

    def __init__(self, model: Dnn, item_categories: Int32[np.ndarray, " items"]) -> None:
        super().__init__(model, item_categories)
        first, width = SCORE_UNITS[0], model.spec.input_dim
        self.user_shapes = {"user_hidden": (1, first)}
        self.item_shapes = {"item_hidden": (first,)}
        kernel = model.score_1.folded().kernel
        self.user_kernel = self.constant("user_kernel", kernel[:width])
        self.item_kernel = self.constant("item_kernel", kernel[width:])
        self.score_1 = self.dense(model.score_1)
        self.score_2, self.score_3 = self.dense(model.score_2), self.dense(model.score_3)
        self.score_4 = self.constant("score_kernel", model.score_4.folded().kernel)

    @override
    def _encode_inputs(self, history_inputs: Any) -> dict[str, Any]:
        hidden = tf.matmul(mean_of_present(history_inputs), self.user_kernel)
        return {"user_hidden": hidden[:, None, :]}

    @override
    def _encode_embeddings(self, item_embeddings: Any) -> dict[str, Any]:
        return {"item_hidden": tf.matmul(item_embeddings, self.item_kernel) + self.score_1.bias}

    @override
    def score(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        hidden = self.score_1.activate(user["user_hidden"] + item["item_hidden"])
        outputs = self.score_3(self.score_2(hidden))
        return tf.squeeze(tf.tensordot(outputs, self.score_4, 1), -1)
