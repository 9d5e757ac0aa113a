"""NANN's deep model with attention (reference/nann.md, "Model"), factored where its arguments split.

With x = PReLU(dense128(item embedding)), q = W2 x + b2 and k_l = V2 y_l + c2, the attention logit is

    q·k_l / 16 = x · (W2' k_l) / 16 + b2·k_l / 16            16 = sqrt(256)

so the 256-wide query is never formed: per pair there remains a product with 128-wide user keys. The
attention output enters the score only through the first dense layer, hence

    concat(sum_l w_l v_l, e) [Wa; We] + b = sum_l w_l (v_l Wa) + (e We + b)

About 23 thousand multiply-adds a pair instead of 84 thousand, by algebra alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from typing_extensions import override

from nann.offline.models.layers import DenseBlock, FoldedDense
from nann.offline.models.model import ModelSpec, RetrievalModel, ServingModel

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["AttentionDnn"]

QUERY_HIDDEN_UNITS = 128
QUERY_UNITS = 256
SCORE_UNITS = (128, 64, 32)
KEY_BIAS_COLUMNS = 16  # one is meant, the others make a whole vector
ATTENTION_SCALE = float(1 / np.sqrt(QUERY_UNITS))


class AttentionDnn(RetrievalModel):
    """Attention of the candidate over the history, then a four-layer score network.

    The softmax runs over all history positions without a mask, as in NANN: padded positions are zero
    vectors, and still take weight.
    """

    def __init__(self, spec: ModelSpec, *, seed: int = 0) -> None:
        super().__init__(spec, name="attention_dnn", seed=seed)
        dim, width = spec.embedding_dim, spec.input_dim
        hidden, query = QUERY_HIDDEN_UNITS, QUERY_UNITS
        self.query_1 = DenseBlock(dim, hidden, name="attention_q_1", seed=seed + 10)
        self.query_2 = DenseBlock(hidden, query, activate=False, name="attention_q_2", seed=seed + 11)
        self.key_1 = DenseBlock(width, hidden, name="attention_k_1", seed=seed + 12)
        self.key_2 = DenseBlock(hidden, query, activate=False, name="attention_k_2", seed=seed + 13)
        first, second, third = SCORE_UNITS
        self.score_1 = DenseBlock(width + dim, first, norm=True, name="dnn_1", seed=seed + 14)
        self.score_2 = DenseBlock(first, second, norm=True, name="dnn_2", seed=seed + 15)
        self.score_3 = DenseBlock(second, third, norm=True, name="dnn_3", seed=seed + 16)
        self.score_4 = DenseBlock(third, 1, activate=False, use_bias=False, name="dnn_4", seed=seed + 17)

    @override
    def encode_history(self, history_inputs: Any, training: bool = False) -> dict[str, Any]:
        """Keys [G, U, 128, L], key bias [G, U, 1, L] and values [G, U, L, 128] of the histories."""
        query_kernel, key_kernel = map(tf.convert_to_tensor, (self.query_2.kernel, self.key_2.kernel))
        query_bias, key_bias = map(tf.convert_to_tensor, (self.query_2.bias, self.key_2.bias))
        merged = tf.matmul(key_kernel, query_kernel, transpose_b=True) * ATTENTION_SCALE
        merged_bias = tf.linalg.matvec(query_kernel, key_bias) * ATTENTION_SCALE
        bias_kernel = tf.linalg.matvec(key_kernel, query_bias) * ATTENTION_SCALE
        bias_bias = tf.tensordot(key_bias, query_bias, 1) * ATTENTION_SCALE
        hidden = self.key_1(history_inputs)
        # One product for keys and key bias.
        kernel = tf.concat([merged, bias_kernel[:, None]], axis=1)
        bias = tf.concat([merged_bias, bias_bias[None]], axis=0)
        keys = tf.linalg.matrix_transpose(_dense(hidden, kernel) + bias)
        values = _dense(history_inputs, self.score_1.kernel[: self.spec.input_dim])
        return {
            "user_keys": keys[..., :QUERY_HIDDEN_UNITS, :],
            "user_key_bias": keys[..., QUERY_HIDDEN_UNITS:, :],
            "user_values": values,
        }

    @override
    def pair_hidden(self, user: Mapping[str, Any], item_embeddings: Any) -> Any:
        query = self.query_1(item_embeddings)
        n_users = user["user_keys"].shape[1]
        if query.shape[1] != n_users:
            # XLA multiplies explicit copies twice as fast as it broadcasts within groups (0.16 s against
            # 0.29 s a step of 8 groups, 32 users, 200 candidates on two cores).
            query = tf.tile(query, [1, n_users, 1, 1])
        item_hidden = _dense(item_embeddings, self.score_1.kernel[self.spec.input_dim :]) + self.score_1.bias
        weights = tf.nn.softmax(tf.matmul(query, user["user_keys"]) + user["user_key_bias"])
        return tf.matmul(weights, user["user_values"]) + item_hidden

    @override
    def tail(self, hidden: Any, training: bool = False) -> Any:
        outputs = self.score_1.finish(hidden, training)
        outputs = self.score_3(self.score_2(outputs, training=training), training=training)
        return tf.squeeze(self.score_4(outputs), -1)

    @override
    def fold(self, item_categories: Int32[np.ndarray, " items"]) -> ServingModel:
        return ServingAttentionDnn(self, item_categories)


class ServingAttentionDnn(ServingModel):
    """The folded form; `user_keys` and `user_key_bias` carry the attention's 1 / sqrt(256)."""

    def __init__(self, model: AttentionDnn, item_categories: Int32[np.ndarray, " items"]) -> None:
        super().__init__(model, item_categories)
        length, (first, _, _) = model.spec.history_length, SCORE_UNITS
        self.user_shapes = {
            "user_key_bias": (1, length),
            "user_keys": (QUERY_HIDDEN_UNITS, length),
            "user_values": (length, first),
        }
        self.item_shapes = {"item_hidden": (first,), "item_query": (QUERY_HIDDEN_UNITS,)}
        query_2, key_2 = model.query_2.folded(), model.key_2.folded()
        self.query_1, self.key_1 = self.dense(model.query_1), self.dense(model.key_1)
        kernel = key_2.kernel.astype(np.float64) @ query_2.kernel.T * ATTENTION_SCALE
        bias = query_2.kernel.astype(np.float64) @ key_2.bias * ATTENTION_SCALE
        bias_kernel = key_2.kernel.astype(np.float64) @ query_2.bias[:, None] * ATTENTION_SCALE
        bias_bias = (key_2.bias.astype(np.float64) @ query_2.bias)[None] * ATTENTION_SCALE
        # Keys and key bias are one product, as wide as whole vectors: XLA rounds a product with one column
        # differently in batches of different sizes.
        padding = np.zeros((len(kernel), KEY_BIAS_COLUMNS - 1))
        kernel = np.concatenate([kernel, bias_kernel, padding], axis=1)
        bias = np.concatenate([bias, bias_bias, padding[0]])
        self.key_kernel = self.constant("key_kernel", kernel.astype(np.float32))
        self.key_bias = self.constant("key_bias", bias.astype(np.float32))
        score_1: FoldedDense = model.score_1.folded()
        width = model.spec.input_dim
        self.value_kernel = self.constant("value_kernel", score_1.kernel[:width])
        self.item_kernel = self.constant("item_kernel", score_1.kernel[width:])
        self.score_1 = self.dense(model.score_1)
        self.score_2, self.score_3 = self.dense(model.score_2), self.dense(model.score_3)
        self.score_4 = self.constant("score_kernel", model.score_4.folded().kernel)

    @override
    def _encode_inputs(self, history_inputs: Any) -> dict[str, Any]:
        hidden = self.key_1(history_inputs)
        keys = tf.linalg.matrix_transpose(tf.tensordot(hidden, self.key_kernel, 1) + self.key_bias)
        return {
            "user_key_bias": keys[:, QUERY_HIDDEN_UNITS : QUERY_HIDDEN_UNITS + 1],
            "user_keys": keys[:, :QUERY_HIDDEN_UNITS],
            "user_values": tf.tensordot(history_inputs, self.value_kernel, 1),
        }

    @override
    def _encode_embeddings(self, item_embeddings: Any) -> dict[str, Any]:
        return {
            "item_hidden": tf.matmul(item_embeddings, self.item_kernel) + self.score_1.bias,
            "item_query": self.query_1(item_embeddings),
        }

    @override
    def score(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        logits = tf.matmul(item["item_query"], user["user_keys"]) + user["user_key_bias"]
        hidden = tf.matmul(tf.nn.softmax(logits), user["user_values"]) + item["item_hidden"]
        outputs = self.score_3(self.score_2(self.score_1.activate(hidden)))
        return tf.squeeze(tf.tensordot(outputs, self.score_4, 1), -1)


def _dense(inputs: Any, kernel: Any) -> Any:
    """[..., n] x [n, m] as one flat product."""
    flat = tf.reshape(inputs, [-1, inputs.shape[-1]])
    return tf.reshape(tf.matmul(flat, kernel), tf.concat([tf.shape(inputs)[:-1], [kernel.shape[-1]]], 0))
