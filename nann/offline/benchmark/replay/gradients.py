"""Neighbours judged by the model's gradient before they are scored, as GUITAR does (WWW '23).

At an expanded item x with embedding e(x), the score s rises in the direction g = ds/de; a neighbour y is
judged by the angle between g and e(y) - e(x), or by the first-order estimate s(x) + g · (e(y) - e(x)).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tensorflow as tf

from nann.offline.checkpoints import load_model
from nann.offline.data.dataset import Dataset

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["Gradients", "Rule", "guided"]

Rule = Literal["angle", "estimate"]

_WIDTH = 16  # nodes of a call: XLA compiles one shape


class Gradients:
    """ds/de of the trained model for chosen users and items."""

    def __init__(self, run: Path, embeddings: Float32[np.ndarray, "N d"]) -> None:
        model = load_model(run / "model")[0].fold(Dataset.load(run / "data").item_categories)
        self._model: Any = model
        self._embeddings = embeddings

        @tf.function(jit_compile=True)  # type: ignore[untyped-decorator]
        def gradient(user: dict[str, Any], embeddings: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(embeddings)
                item = {name: value[None] for name, value in model._encode_embeddings(embeddings).items()}
                # Each score depends on its own embedding alone.
                total = tf.reduce_sum(model.score(user, item))
            return tape.gradient(total, embeddings)

        self._gradient = gradient

    def encode(self, history: Int32[np.ndarray, " length"]) -> dict[str, Any]:
        """The user's side of the model, for `of`."""
        return dict(self._model.encode_user(tf.constant(history[None])))

    def of(self, user: dict[str, Any], items: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
        """The gradients at `items`."""
        found = []
        for start in range(0, len(items), _WIDTH):
            rows = self._embeddings[items[start : start + _WIDTH]]
            padded = np.pad(rows, ((0, _WIDTH - len(rows)), (0, 0)))
            found.append(self._gradient(user, tf.constant(padded)).numpy()[: len(rows)])
        return np.concatenate(found)


def guided(
    scores: Float32[np.ndarray, " N"],
    graph: Int32[np.ndarray, "N degree"],
    starts: Int32[np.ndarray, " n"],
    embeddings: Float32[np.ndarray, "N d"],
    gradients: Gradients,
    history: Int32[np.ndarray, " length"],
    *,
    ef: int,
    rule: Rule,
    keep: float,
    price: float,
    beam: int = 16,
) -> tuple[int, int, Int32[np.ndarray, " n"]]:
    """Best first, but of the new neighbours of a step only some are scored; the others may come again.

    By "angle" these are, of each expanded item, the share `keep` with the smallest angle to its gradient. By
    "estimate" they are those whose estimate is above the 200th score less `keep` times the spread of the
    best 200. An expanded item's gradient costs `price` scores.
    """
    user = gradients.encode(history)
    visited = np.zeros(len(scores), np.bool_)
    expanded = np.zeros(len(scores), np.bool_)
    fresh = np.unique(starts[starts >= 0])
    pool = np.empty(0, np.int32)
    scored, steps, cost = 0, 0, 0.0
    while True:
        visited[fresh] = True
        scored += len(fresh)
        steps += 1
        pool = np.concatenate([pool, fresh])
        pool = pool[np.argsort(-scores[pool], kind="stable")[: max(ef, 200)]]
        opened = pool[:ef][~expanded[pool[:ef]]][:beam]
        if len(opened) == 0:
            break
        expanded[opened] = True
        cost += price * len(opened)
        floor = scores[pool[min(199, len(pool) - 1)]]
        spread = scores[pool[0]] - floor
        chosen = []
        for item, gradient in zip(opened, gradients.of(user, opened), strict=True):
            row = graph[item]
            row = row[row >= 0]
            row = row[~visited[row]]
            if len(row) == 0:
                continue
            step = embeddings[row] - embeddings[item]
            gain = step @ gradient
            if rule == "angle":
                cosine = gain / np.maximum(np.linalg.norm(step, axis=1), 1e-12)
                chosen.append(row[np.argsort(-cosine)[: max(1, round(keep * len(row)))]])
            else:
                chosen.append(row[scores[item] + gain >= floor - keep * spread])
        fresh = np.unique(np.concatenate(chosen)) if chosen else np.empty(0, np.int32)
    return round(scored + cost), steps, pool[:200].astype(np.int32)
