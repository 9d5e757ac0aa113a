"""Users' histories as NANN's clients send them: the model's own input rows, in half precision.

The rows are read from the published SavedModel, so nothing but the version is needed, and TensorFlow.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.artifacts import Artifact

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int32

__all__ = ["embedded_histories"]

_KEY = "{}/.ATTRIBUTES/VARIABLE_VALUE"  # how TensorFlow names a variable that is a module's attribute


def embedded_histories(version_dir: Path, *, limit: int, seed: int) -> Float16[np.ndarray, "users length D"]:
    """The last items of `limit` different users of the version, oldest first, zeros after them.

    The users are a seeded sample of those that have a history, in random order.

    Raises:
        ArtifactError: the version is damaged.
        ValueError: it knows fewer such users, its model has no input tables, or they are not those that
            the version recognises histories by.
    """
    artifact = Artifact.open(version_dir, verify="fast")
    splits, length = artifact.history_row_splits, artifact.manifest.history_length
    users = np.random.default_rng(seed).permutation(np.flatnonzero(np.diff(splits)))[:limit]
    if users.size < limit:
        raise ValueError(f"{version_dir} knows {users.size} users with a history, not {limit}")
    histories = np.full((limit, length), -1, dtype=np.int32)
    for history, user in zip(histories, users.tolist(), strict=True):
        items = artifact.history_items[splits[user] : splits[user + 1]][-length:]
        history[: items.size] = items
    rows = _input_rows(version_dir, histories).astype(np.float16)
    table = artifact.input_rows
    if table is not None and table.recognise(rows.reshape(-1, rows.shape[-1]))[1]:
        raise ValueError(f"the input tables of {version_dir} are not those of its row hashes")
    return rows


def _input_rows(
    version_dir: Path, items: Int32[np.ndarray, "users length"]
) -> Float32[np.ndarray, "users length D"]:
    """`ServingModel.inputs_of`, from the variables of the SavedModel; -1 is a row of zeros."""
    import tensorflow as tf

    saved = tf.train.load_checkpoint(str(version_dir / "variables" / "variables"))
    names = [_KEY.format(name) for name in ("item_table", "category_of_row", "category_table")]
    if missing := [name for name in names if not saved.has_tensor(name)]:
        raise ValueError(f"{version_dir}: its model has no input tables ({missing[0].partition('/')[0]})")
    item_table, category_of_row, category_table = map(saved.get_tensor, names)
    rows = items + 1  # row 0 is padding's
    joined: np.ndarray = np.concatenate([item_table[rows], category_table[category_of_row[rows]]], axis=-1)
    return joined
