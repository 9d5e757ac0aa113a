"""The two-sided model: a user tower over the mean of the history, dotted with the item embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from typing_extensions import override

from nann.offline.models.dnn import mean_of_present
from nann.offline.models.layers import DenseBlock
from nann.offline.models.model import ModelSpec, RetrievalModel, ServingModel

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int32

__all__ = ["TwoSided"]

USER_UNITS = (128, 64)


class TwoSided(RetrievalModel):
    """User vector · item embedding, the item embedding being what every model here indexes."""

    def __init__(self, spec: ModelSpec, *, seed: int = 0) -> None:
        super().__init__(spec, name="two_sided", seed=seed)
        first, second = USER_UNITS
        self.user_1 = DenseBlock(spec.input_dim, first, norm=True, name="dnn_user_1", seed=seed + 10)
        self.user_2 = DenseBlock(first, second, norm=True, name="dnn_user_2", seed=seed + 11)
        self.user_3 = DenseBlock(
            second, spec.embedding_dim, activate=False, name="dnn_user_3", seed=seed + 12
        )

    @override
    def encode_history(self, history_inputs: Any, training: bool = False) -> dict[str, Any]:
        outputs = mean_of_present(history_inputs)
        for block in (self.user_1, self.user_2, self.user_3):
            outputs = block(outputs, training=training)
        return {"user_vector": outputs[..., None, :]}

    @override
    def pair_hidden(self, user: Mapping[str, Any], item_embeddings: Any) -> Any:
        return tf.matmul(item_embeddings, user["user_vector"], transpose_b=True)

    @override
    def tail(self, hidden: Any, training: bool = False) -> Any:
        return tf.squeeze(hidden, -1)

    @override
    def fold(self, item_categories: Int32[np.ndarray, " items"]) -> ServingModel:
        return ServingTwoSided(self, item_categories)


class ServingTwoSided(ServingModel):
    """The folded form: two vectors of the embedding's width."""

    def __init__(self, model: TwoSided, item_categories: Int32[np.ndarray, " items"]) -> None:
        super().__init__(model, item_categories)
        dim = model.spec.embedding_dim
        self.user_shapes = {"user_vector": (1, dim)}
        self.item_shapes = {"item_vector": (dim,)}
        self.user_tower = [self.dense(block) for block in (model.user_1, model.user_2, model.user_3)]

    @override
    def _encode_inputs(self, history_inputs: Any) -> dict[str, Any]:
        outputs = mean_of_present(history_inputs)
        for layer in self.user_tower:
            outputs = layer(outputs)
        return {"user_vector": outputs[:, None, :]}

    @override
    def _encode_embeddings(self, item_embeddings: Any) -> dict[str, Any]:
        return {"item_vector": item_embeddings}

    @override
    def score(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        # Not a matrix product: XLA rounds a product with one column differently for one tile than for
        # several, and a score must not depend on that (docs/adr/0004-scoring-shapes.md).
        return tf.reduce_sum(item["item_vector"] * user["user_vector"], axis=-1)
