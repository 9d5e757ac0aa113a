"""What every retrieval model offers: a training forward in three parts, and its folded serving form.

The parts follow where the arguments split: `embed_items` depends on the item alone, `encode_history`
on the user alone, `pair_hidden` and `tail` on both. Candidates are grouped in training: G groups of U
users each; a group's users share C candidates, or every user has C of their own:

    history inputs   [G, U, L, input_dim]
    user tensors     [G, U, ...]
    item embeddings  [G, 1, C, embedding_dim] shared by the users of a group, or [G, U, C, embedding_dim]
    logits           [G, U, C]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from nann.offline.models.layers import DenseBlock, FoldedDense, prelu

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["ModelSpec", "RetrievalModel", "ServingModel", "TensorShapes"]

ID_EMBEDDING_DIM = 32  # items and categories alike (reference/nann.md, "Model")
ITEM_HIDDEN_UNITS = 64

TensorShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes that the data decides; the network's own widths are NANN's and fixed."""

    num_items: int
    num_categories: int
    history_length: int = 50

    @property
    def input_dim(self) -> int:
        """Width of an item's input: its own embedding beside its category's."""
        return 2 * ID_EMBEDDING_DIM

    @property
    def embedding_dim(self) -> int:
        """Width of the item tower's output, the embedding that is indexed."""
        return 64


class RetrievalModel(keras.Model):  # type: ignore[misc]
    """Embedding tables and item tower, common to all models; subclasses add the user and the pair.

    Row 0 of both tables stands for missing or padding and is always read as zeros; item index i is row
    i + 1 of the item table, category c is row c of the category table (0 = no category).
    """

    def __init__(self, spec: ModelSpec, *, name: str, seed: int = 0) -> None:
        super().__init__(name=name)
        self.spec = spec
        dim = ID_EMBEDDING_DIM
        stddev = 1 / np.sqrt(dim)
        self.item_table = self.add_weight(
            shape=(spec.num_items + 1, dim),
            initializer=keras.initializers.TruncatedNormal(stddev=stddev, seed=seed),
            name="item_table",
        )
        self.category_table = self.add_weight(
            shape=(spec.num_categories + 1, dim),
            initializer=keras.initializers.TruncatedNormal(stddev=stddev, seed=seed + 1),
            name="category_table",
        )
        units, width = ITEM_HIDDEN_UNITS, spec.input_dim
        self.item_1 = DenseBlock(width, units, norm=True, name="dnn_item_1", seed=seed + 2)
        self.item_2 = DenseBlock(units, units, norm=True, name="dnn_item_2", seed=seed + 3)
        self.item_3 = DenseBlock(units, spec.embedding_dim, activate=False, name="dnn_item_3", seed=seed + 4)

    def embed_items(self, inputs: Any, training: bool = False) -> Any:
        """Item tower: [..., input_dim] -> the item embedding [..., embedding_dim]."""
        return self.item_3(self.item_2(self.item_1(inputs, training=training), training=training))

    def encode_history(self, history_inputs: Any, training: bool = False) -> dict[str, Any]:
        """The user-only part: [G, U, L, input_dim] -> named tensors [G, U, ...]."""
        raise NotImplementedError

    def pair_hidden(self, user: Mapping[str, Any], item_embeddings: Any) -> Any:
        """Users × candidates up to the first thing that needs moments over all pairs: [G, U, C, units]."""
        raise NotImplementedError

    def tail(self, hidden: Any, training: bool = False) -> Any:
        """The rest of the network: [G, U, C, units] -> logits [G, U, C]."""
        raise NotImplementedError

    def fold(self, item_categories: Int32[np.ndarray, " items"]) -> ServingModel:
        """The model as it stands, folded for serving; `item_categories` become part of it."""
        raise NotImplementedError

    @contextmanager
    def moments_kept(self) -> Iterator[None]:
        """Within it a training forward normalises by its batch but leaves the moving moments alone."""
        blocks = [layer for layer in self.layers if isinstance(layer, DenseBlock)]
        for block in blocks:
            block.keeps_moments = True
        try:
            yield
        finally:
            for block in blocks:
                block.keeps_moments = False

    def weights_by_name(self) -> dict[str, Any]:
        """Every variable as a `tf.Variable`, tables and moving moments too, by a stable name."""
        named = {"item_table": self.item_table, "category_table": self.category_table}
        for layer in self.layers:
            for variable in layer.weights:
                named[f"{layer.name}/{variable.name}"] = variable
        return {name: variable.value for name, variable in named.items()}

    def dense_trainables(self) -> dict[str, Any]:
        """The trainable `tf.Variable`s except the item table, whose rows are updated sparsely."""
        trainable = {id(variable.value) for variable in self.trainable_variables}
        return {
            name: variable
            for name, variable in self.weights_by_name().items()
            if id(variable) in trainable and name != "item_table"
        }

    def _tables_with_padding(self) -> tuple[np.ndarray, np.ndarray]:
        item_table, category_table = (
            np.array(keras.ops.convert_to_numpy(table)) for table in (self.item_table, self.category_table)
        )
        item_table[0] = 0.0
        category_table[0] = 0.0
        return item_table, category_table


class ServingModel(tf.Module):  # type: ignore[misc]
    """Folded model: plain variables and the four functions that the SavedModel's signatures run.

    Subclasses define `user_shapes`, `item_shapes`, `_encode_inputs`, `_encode_embeddings` and `score`.
    """

    user_shapes: TensorShapes
    item_shapes: TensorShapes

    def __init__(self, model: RetrievalModel, item_categories: Int32[np.ndarray, " items"]) -> None:
        super().__init__(name=model.name)
        self.spec = model.spec
        item_table, category_table = model._tables_with_padding()
        if item_categories.shape != (self.spec.num_items,):
            raise ValueError(
                f"item_categories: expected [{self.spec.num_items}], got {item_categories.shape}"
            )
        self.item_table = self.constant("item_table", item_table)
        self.category_table = self.constant("category_table", category_table)
        rows = np.concatenate([[0], item_categories]).astype(np.int32)
        self.category_of_row = self.constant("category_of_row", rows)
        self.item_tower = [self.dense(block) for block in (model.item_1, model.item_2, model.item_3)]

    def constant(self, name: str, value: np.ndarray) -> Any:
        """A variable that is never trained: an argument of compiled programs, not a constant in them."""
        return tf.Variable(value, trainable=False, name=name)

    def dense(self, block: DenseBlock) -> Dense:
        """The block, folded."""
        return Dense(block.folded(), block.name)

    def inputs_of(self, item_index: Any) -> Any:
        """Item indices (any shape, -1 = missing) -> raw inputs [..., input_dim], zeros where missing."""
        row = item_index + 1
        category = tf.gather(self.category_of_row, row)
        return tf.concat([tf.gather(self.item_table, row), tf.gather(self.category_table, category)], axis=-1)

    def embed_items(self, item_index: Any) -> Float32[Any, "n embedding_dim"]:
        """Item indices [n] -> the embeddings that are indexed."""
        outputs = self.inputs_of(item_index)
        for layer in self.item_tower:
            outputs = layer(outputs)
        return outputs

    def encode_user(self, history: Int32[Any, "batch length"]) -> dict[str, Any]:
        """Histories as item indices, oldest first, -1 padded at the end -> user tensors."""
        return self._encode_inputs(self.inputs_of(history))

    def encode_user_comm_seq(self, comm_seq: Float32[Any, "batch flat"]) -> dict[str, Any]:
        """NANN's already embedded history [batch, L * input_dim] -> user tensors."""
        shape = [-1, self.spec.history_length, self.spec.input_dim]
        return self._encode_inputs(tf.reshape(comm_seq, shape))

    def encode_items(self, item_index: Int32[Any, " n"]) -> dict[str, Any]:
        """Item indices [n] -> item tensors [n, ...]."""
        return self._encode_embeddings(self.embed_items(item_index))

    def _encode_inputs(self, history_inputs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _encode_embeddings(self, item_embeddings: Any) -> dict[str, Any]:
        raise NotImplementedError

    def score(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
        """User tensors [B, ...] × item tensors [B or 1, C, ...] -> scores [B, C]."""
        raise NotImplementedError


class Dense(tf.Module):  # type: ignore[misc]
    """A folded dense layer of the serving form, weights as variables."""

    def __init__(self, folded: FoldedDense, name: str) -> None:
        super().__init__(name=name)
        self.kernel = tf.Variable(folded.kernel, trainable=False, name=f"{name}_kernel")
        self.bias = tf.Variable(folded.bias, trainable=False, name=f"{name}_bias")
        self.slope = (
            None if folded.slope is None else tf.Variable(folded.slope, trainable=False, name=f"{name}_slope")
        )

    def __call__(self, inputs: Any) -> Any:
        """[..., inputs] -> [..., units]."""
        return self.activate(tf.tensordot(inputs, self.kernel, 1) + self.bias)

    def activate(self, pre_activation: Any) -> Any:
        """The PReLU alone, where the layer has one."""
        return pre_activation if self.slope is None else prelu(pre_activation, self.slope)
