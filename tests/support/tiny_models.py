"""Small SavedModels in the form the engine serves, and artifacts made of a world and such a model.

TensorFlow is imported inside the functions, so that tests which need no model do not pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from engine_world import make_world

from nann.engine.artifacts import Manifest, TensorSpec, hash_files, read_manifest, write_manifest

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = [
    "Sizes",
    "TinyModel",
    "attention",
    "integer_dot",
    "make_model_world",
    "publish",
    "publish_programs",
    "real_model",
]

SIGNATURES = ("encode_user", "encode_user_comm_seq", "encode_items", "score")


@dataclass(frozen=True)
class Sizes:
    """Widths of the attention-like model; the defaults keep a SavedModel under 100 KB."""

    history_length: int = 6
    input_dim: int = 8
    query: int = 16
    hidden: tuple[int, int] = (16, 8)


@dataclass(frozen=True)
class TinyModel:
    """A module with the four functions of the contract, and what a manifest must say of it.

    `item_inputs` [N, input_dim] is what a history item is embedded to, so that
    ``comm_seq = item_inputs[history].ravel()`` describes the same user as `history` does.
    """

    module: tf.Module
    kind: str
    history_length: int
    input_dim: int
    user_shapes: Mapping[str, tuple[int, ...]]
    item_shapes: Mapping[str, tuple[int, ...]]
    item_inputs: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.item_inputs)

    def comm_seq(self, history: np.ndarray) -> np.ndarray:
        """[length] item indices, -1 = missing -> the embedded history [length * input_dim] float32."""
        rows = np.where(history[:, None] >= 0, self.item_inputs[history], 0)
        return rows.astype(np.float32).ravel()

    def item_state(self) -> dict[str, np.ndarray]:
        """The float16 tables of an artifact, one for each item tensor."""
        tensors = self.module.encode_items(np.arange(self.num_items, dtype=np.int32))
        return {name: tensor.numpy().astype(np.float16) for name, tensor in tensors.items()}


def attention(num_items: int, *, sizes: Sizes | None = None, seed: int = 0) -> TinyModel:
    """Softmax attention over the history and a PReLU tail, with the tensor names of the served model."""
    import tensorflow as tf

    sizes = sizes or Sizes()
    rng = np.random.default_rng(seed)
    first, second = sizes.hidden

    def weight(*shape: int) -> tf.Variable:
        value = rng.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32)
        return tf.Variable(value, trainable=False)

    class Attention(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="attention")
            rows = rng.normal(0, 1, (num_items + 1, sizes.input_dim)).astype(np.float32)
            rows[0] = 0
            self.table = tf.Variable(rows, trainable=False)
            # Keys, their bias and padding: a product with one column would depend on the size of the batch.
            self.key = weight(sizes.input_dim, sizes.query + 16)
            self.value = weight(sizes.input_dim, first)
            self.query, self.item = weight(sizes.input_dim, sizes.query), weight(sizes.input_dim, first)
            self.tail_1, self.tail_2 = weight(first, second), weight(second, 1)

        def _encode(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            keys = tf.linalg.matrix_transpose(tf.tensordot(inputs, self.key, 1))
            return {
                "user_keys": keys[:, : sizes.query],
                "user_key_bias": keys[:, sizes.query : sizes.query + 1],
                "user_values": tf.tensordot(inputs, self.value, 1),
            }

        def encode_user(self, history: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._encode(tf.gather(self.table, history + 1))

        def encode_user_comm_seq(self, comm_seq: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._encode(tf.reshape(comm_seq, [-1, sizes.history_length, sizes.input_dim]))

        def encode_items(self, item_index: tf.Tensor) -> dict[str, tf.Tensor]:
            inputs = tf.gather(self.table, item_index + 1)
            return {
                "item_query": tf.matmul(inputs, self.query),
                "item_hidden": tf.matmul(inputs, self.item),
            }

        def score(self, **tensors: tf.Tensor) -> dict[str, tf.Tensor]:
            logits = tf.matmul(tensors["item_query"], tensors["user_keys"]) + tensors["user_key_bias"]
            hidden = tf.matmul(tf.nn.softmax(logits), tensors["user_values"]) + tensors["item_hidden"]
            hidden = tf.tensordot(_prelu(tf, hidden), self.tail_1, 1)
            return {"score": tf.squeeze(tf.tensordot(_prelu(tf, hidden), self.tail_2, 1), -1)}

    module = Attention()
    return TinyModel(
        module=module,
        kind="attention",
        history_length=sizes.history_length,
        input_dim=sizes.input_dim,
        user_shapes={
            "user_keys": (sizes.query, sizes.history_length),
            "user_key_bias": (1, sizes.history_length),
            "user_values": (sizes.history_length, first),
        },
        item_shapes={"item_query": (sizes.query,), "item_hidden": (first,)},
        item_inputs=module.table.numpy()[1:],
    )


def integer_dot(item_vectors: np.ndarray, *, history_length: int) -> TinyModel:
    """score = (sum of the history's vectors) · vector, over integers small enough to be exact in float16."""
    import tensorflow as tf

    dim = item_vectors.shape[1]

    class IntegerDot(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="integer_dot")
            rows = np.concatenate([np.zeros((1, dim)), item_vectors]).astype(np.float32)
            self.table = tf.Variable(rows, trainable=False)

        def encode_user(self, history: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"user_vector": tf.reduce_sum(tf.gather(self.table, history + 1), axis=1)[:, None]}

        def encode_user_comm_seq(self, comm_seq: tf.Tensor) -> dict[str, tf.Tensor]:
            rows = tf.reshape(comm_seq, [-1, history_length, dim])
            return {"user_vector": tf.reduce_sum(rows, axis=1)[:, None]}

        def encode_items(self, item_index: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"item_vector": tf.gather(self.table, item_index + 1)}

        def score(self, **tensors: tf.Tensor) -> dict[str, tf.Tensor]:
            product = tf.matmul(tensors["item_vector"], tensors["user_vector"], transpose_b=True)
            return {"score": tf.squeeze(product, -1)}

    return TinyModel(
        module=IntegerDot(),
        kind="integer_dot",
        history_length=history_length,
        input_dim=dim,
        user_shapes={"user_vector": (1, dim)},
        item_shapes={"item_vector": (dim,)},
        item_inputs=item_vectors.astype(np.float32),
    )


def real_model(name: str, num_items: int, *, history_length: int = 50, seed: int = 0) -> TinyModel:
    """A model of the offline registry at its real widths over a small vocabulary, folded for serving."""
    from nann.offline.models.model import ModelSpec
    from nann.offline.models.registry import create_model

    rng = np.random.default_rng(seed)
    spec = ModelSpec(num_items, 7, history_length=history_length)
    serving = create_model(name, spec, seed=seed).fold(rng.integers(0, 8, num_items).astype(np.int32))
    return TinyModel(
        module=serving,
        kind=name,
        history_length=history_length,
        input_dim=spec.input_dim,
        user_shapes=serving.user_shapes,
        item_shapes=serving.item_shapes,
        item_inputs=serving.inputs_of(np.arange(num_items, dtype=np.int32)).numpy(),
    )


def save(model: TinyModel, directory: Path) -> None:
    """Write the SavedModel with the four signatures of the contract."""
    import tensorflow as tf

    module = model.module

    def encode_user(history: tf.Tensor) -> dict[str, tf.Tensor]:
        return module.encode_user(history)

    def encode_user_comm_seq(comm_seq: tf.Tensor) -> dict[str, tf.Tensor]:
        return module.encode_user_comm_seq(comm_seq)

    def encode_items(item_index: tf.Tensor) -> dict[str, tf.Tensor]:
        return module.encode_items(item_index)

    def score(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        if model.kind in ("attention", "integer_dot"):
            return module.score(**tensors)
        users = {name: tensors[name] for name in model.user_shapes}
        return {"score": module.score(users, {name: tensors[name] for name in model.item_shapes})}

    arguments = {
        "encode_user": {"history": ([None, model.history_length], tf.int32)},
        "encode_user_comm_seq": {"comm_seq": ([None, model.history_length * model.input_dim], tf.float32)},
        "encode_items": {"item_index": ([None], tf.int32)},
        "score": {
            **{name: ([None, *shape], tf.float32) for name, shape in model.user_shapes.items()},
            **{name: ([None, None, *shape], tf.float32) for name, shape in model.item_shapes.items()},
        },
    }
    functions = (encode_user, encode_user_comm_seq, encode_items, score)
    signatures = {
        function.__name__: tf.function(function, autograph=False).get_concrete_function(
            **{
                name: tf.TensorSpec(shape, dtype, name=name)
                for name, (shape, dtype) in arguments[function.__name__].items()
            }
        )
        for function in functions
    }
    tf.saved_model.save(module, str(directory), signatures=signatures)


def publish(model: TinyModel, directory: Path) -> Manifest:
    """Give the world's artifact in `directory` this model in place of its own."""
    arrays = directory / "arrays"
    for old in arrays.glob("item_state_*.npy"):
        old.unlink()
    for name, table in model.item_state().items():
        np.save(arrays / f"item_state_{name}.npy", table)
    save(model, directory)
    manifest = read_manifest(directory).model_copy(
        update={
            "model_type": model.kind,
            "history_length": model.history_length,
            "input_dim": model.input_dim,
            "user_tensors": {n: TensorSpec(shape=s, dtype="float32") for n, s in model.user_shapes.items()},
            "item_tensors": {n: TensorSpec(shape=s, dtype="float16") for n, s in model.item_shapes.items()},
            "files": hash_files(directory),
        }
    )
    write_manifest(directory, manifest)
    return manifest


def publish_programs(directory: Path, **grid: Any) -> Manifest:
    """Add the model's XLA programs to the artifact in `directory`: a set "cpu", in the shapes of `grid`."""
    from nann.offline.export_programs import GridOptions, export_programs
    from nann.offline.progress import Progress

    options = GridOptions(
        **{"max_batch": 4, "max_rows": 64, "tile_rows": 32, "wide": True, "crossed": True} | grid
    )
    manifest = read_manifest(directory)
    programs = export_programs(directory, manifest, {"cpu": options}, progress=Progress(silent=True))
    manifest = manifest.model_copy(update={"programs": programs, "files": hash_files(directory)})
    write_manifest(directory, manifest)
    return manifest


def make_model_world(directory: Path, *, num_items: int = 300, seed: int = 0, **world: Any) -> TinyModel:
    """An artifact over a random graph with a real, small SavedModel: what `SearchEngine.load` takes."""
    make_world(directory, num_items=num_items, seed=seed, **world)
    model = attention(num_items, seed=seed)
    publish(model, directory)
    return model


def _prelu(tf: Any, inputs: Any) -> Any:
    return tf.maximum(inputs, 0.0) + 0.25 * tf.minimum(inputs, 0.0)
