"""The student: two small networks that turn an item into a row of each of the gate's tables.

Training is against the teacher's scores; the networks themselves are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from nann.offline.gate.tables import LearnedTables
from nann.offline.gate.teacher import Pairs
from nann.offline.optimizers import AdamSettings, DenseAdamW, learning_rate_at
from nann.offline.progress import Progress

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int32

    Features = Callable[[Int32[np.ndarray, " n"]], Float32[np.ndarray, "n width"]]

__all__ = ["Student", "train_student"]

UNITS = 192
USERS_A_STEP = 32
# Of a user's items a step sees so many of the best, the very best most often, and so many of the others.
BEST_A_USER, OTHERS_A_USER = 320, 128
PEAK_LEARNING_RATE = 1e-2
WARMUP_STEPS = 100
# Of the listwise cross-entropy beside the squared error: the order at the top decides what a walk finds.
RANKING_WEIGHT = 0.3
_ITEMS_PER_CALL = 16_384
_ABSENT = -1e9  # a history position without an item never is the maximum
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class Student:
    """Weights of the two networks (features -> GELU -> 1 + dim + context_dim), and a step of Adam on them.

    The networks work in units of the teacher's own scores, so that it makes no difference what these are:
    `center` is their mean and `scale` their deviation.
    """

    def __init__(
        self,
        width: int,
        *,
        dim: int,
        context_dim: int,
        center: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.dim = dim
        outputs = 1 + dim + context_dim
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
            values = gain * rng.standard_normal((rows, columns)) / np.sqrt(rows)
            return tf.Variable(values.astype(np.float32))

        # Of the sum b + max(a + k·q) + x·y every product has one factor in the scores' units.
        first = np.eye(1, outputs, dtype=np.float32)[0]
        self._scale = scale
        self._units = {
            "key": np.full(outputs, scale, np.float32),
            "query": 1 + (np.float32(scale) - 1) * first,
        }
        self._zero = {"key": 0 * first, "query": np.float32(center) * first}

        self._weights: dict[str, Any] = {}
        for side in ("key", "query"):
            self._weights |= {
                f"{side}_hidden": matrix(width, UNITS),
                f"{side}_hidden_bias": tf.Variable(tf.zeros([UNITS])),
                f"{side}_out": matrix(UNITS, outputs, dim**-0.25),  # so that k·q starts near 1
                f"{side}_out_bias": tf.Variable(tf.zeros([outputs])),
            }
        self._adam = DenseAdamW(self._weights, (), AdamSettings(weight_decay=0.0))
        self._step = tf.function(self._update, jit_compile=True)
        self._rows = tf.function(
            lambda features: (self._side("key", features), self._side("query", features)),
            input_signature=[tf.TensorSpec([None, width], tf.float32)],
        )

    def train_on(
        self,
        history: Float32[np.ndarray, "users length width"],
        present: np.ndarray,
        items: Float32[np.ndarray, "users candidates width"],
        scores: Float32[np.ndarray, "users candidates"],
        learning_rate: float,
        step: int,
    ) -> Any:
        """One step; the squared error before it. `step` counts from 1."""
        return self._step(
            tf.constant(history),
            tf.constant(present),
            tf.constant(items),
            tf.constant(scores),
            tf.constant(learning_rate, tf.float32),
            tf.constant(step, tf.float32),
        )

    def tables(self, features: Features, num_items: int) -> LearnedTables:
        """Both tables over all items, rounded to what is stored."""
        rows = [
            [_stored(side) for side in self._rows(features(np.arange(start, stop, dtype=np.int32)))]
            for start, stop in _chunks(num_items)
        ]
        keys, queries = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return LearnedTables(keys, queries, self.dim)

    def _side(self, side: str, features: Any) -> Any:
        weights = self._weights
        hidden = tf.nn.gelu(
            tf.tensordot(features, weights[f"{side}_hidden"], 1) + weights[f"{side}_hidden_bias"],
            approximate=True,
        )
        rows = tf.tensordot(hidden, weights[f"{side}_out"], 1) + weights[f"{side}_out_bias"]
        return rows * self._units[side] + self._zero[side]

    def _update(
        self, history: Any, present: Any, items: Any, scores: Any, learning_rate: Any, step: Any
    ) -> Any:
        with tf.GradientTape() as tape:
            estimate = self._estimate(self._side("key", history), present, self._side("query", items))
            squared = tf.reduce_mean(tf.square(estimate - scores))
            ranking = tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(scores), estimate)
            # In units of the scores again, lest Adam's epsilon count where they are small.
            loss = (squared + RANKING_WEIGHT * tf.reduce_mean(ranking)) / self._scale**2
        names = sorted(self._weights)
        gradients = tape.gradient(loss, [self._weights[name] for name in names])
        self._adam.apply(dict(zip(names, gradients, strict=True)), learning_rate, step)
        return squared

    def _estimate(self, keys: Any, present: Any, queries: Any) -> Any:
        """The formula of `LearnedTables.estimate` for [users, length, G] and [users, candidates, G]."""
        split = 1 + self.dim
        attended = tf.matmul(queries[..., 1:split], keys[..., 1:split], transpose_b=True)
        attended += tf.where(present, keys[..., 0], _ABSENT)[:, None, :]
        shown = tf.cast(present, tf.float32)[..., None]
        context = tf.reduce_sum(keys[..., split:] * shown, 1) / tf.reduce_sum(shown, 1)
        return (
            queries[..., 0]
            + tf.reduce_max(attended, axis=-1)
            + tf.linalg.matvec(queries[..., split:], context)
        )


def train_student(
    student: Student, pairs: Pairs, features: Features, *, steps: int, seed: int, progress: Progress
) -> None:
    """Train on samples of `pairs` for so many steps.

    Raises:
        ValueError: the error does not stay finite: the teacher's scores are too large.
    """
    rng = np.random.default_rng([seed, 1])
    with progress.stage("distill", total=steps, unit="steps") as stage:
        for step in range(1, steps + 1):
            users, columns = _sample(rng, pairs)
            history = pairs.histories[users]
            present = history >= 0
            squared = student.train_on(
                features(np.where(present, history, 0)),
                present,
                features(np.take_along_axis(pairs.items[users], columns, 1)),
                np.take_along_axis(pairs.scores[users], columns, 1),
                learning_rate_at(
                    step - 1,
                    peak=PEAK_LEARNING_RATE,
                    warmup_steps=WARMUP_STEPS,
                    total_steps=steps,
                    final_share=0.01,
                ),
                step,
            )
            stage.advance()
            if step % 50 == 0 or step == steps:
                error = float(squared)
                if not np.isfinite(error):
                    raise ValueError(f"distillation diverged at step {step}: the squared error is {error}")
                stage.note(f"rmse {error**0.5:.3f}")


def _sample(rng: np.random.Generator, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Rows of users, and columns of `pairs.items` for each of them."""
    users = rng.integers(0, len(pairs), USERS_A_STEP)
    best = (rng.random((USERS_A_STEP, BEST_A_USER)) ** 2 * pairs.n_best).astype(np.int64)
    others = rng.integers(pairs.n_best, pairs.items.shape[1], (USERS_A_STEP, OTHERS_A_USER))
    return users, np.concatenate([best, others], axis=1)


def _stored(rows: Any) -> Float16[np.ndarray, "n G"]:
    stored: Float16[np.ndarray, "n G"] = np.clip(rows.numpy(), -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
    return stored


def _chunks(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ITEMS_PER_CALL, n)) for start in range(0, n, _ITEMS_PER_CALL)]
