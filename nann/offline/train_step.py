"""One jitted training step: forward, both loss terms, gradients, AdamW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from nann.offline.losses import kl_divergence, sampled_cross_entropy
from nann.offline.models.model import RetrievalModel
from nann.offline.optimizers import AdamSettings, DenseAdamW, LazyAdamRows

if TYPE_CHECKING:
    from nann.offline.sampling import Batch

__all__ = ["TrainStep", "adversarial_embeddings"]


def adversarial_embeddings(embeddings: Any, gradient: Any, adv_eps: float) -> Any:
    """FGSM (Goodfellow et al. 2015): embeddings + eps * sign(d loss / d embeddings), the step a constant."""
    return embeddings + adv_eps * tf.stop_gradient(tf.sign(gradient))


class TrainStep:
    """The step and everything it changes: the model's variables and the optimizers' moments.

    The item table is outside of the compiled program, which sees only the rows a batch names: a table of
    any size costs the same, and XLA never copies it.
    """

    def __init__(
        self,
        model: RetrievalModel,
        *,
        adv_eps: float,
        adv_groups: int,
        weight_decay: float,
        clip_norm: float,
        jit: bool,
    ) -> None:
        self.model = model
        self._adv_eps, self._adv_groups, self._clip_norm = adv_eps, adv_groups, clip_norm
        self._log_items = math.log(model.spec.num_items)
        self._dense = model.dense_trainables()
        # Biases, batch norm and slopes are vectors; the category table is an embedding: none of them decays.
        decayed = [name for name in self._dense if name.endswith("_kernel")]
        settings = AdamSettings(weight_decay=weight_decay)
        self.dense_adam = DenseAdamW(self._dense, decayed, settings)
        self.row_adam = LazyAdamRows(model.item_table.value, settings)
        self._compiled = tf.function(self._update, jit_compile=jit)
        self._run = tf.function(self._step)

    def __call__(self, batch: Batch, learning_rate: float) -> dict[str, Any]:
        """Train on one batch; scalars by name (loss, loss_xe, loss_adv, acc, acc_origin, grad_norm)."""
        metrics: dict[str, Any] = self._run(
            tf.constant(batch.rows),
            tf.constant(batch.row_categories),
            tf.constant(batch.history),
            tf.constant(batch.positive),
            tf.constant(batch.negative),
            tf.constant(batch.positive_log_count),
            tf.constant(batch.negative_log_count),
            tf.constant(learning_rate, tf.float32),
            tf.constant(batch.step + 1, tf.float32),
        )
        return metrics

    def variables(self) -> dict[str, Any]:
        """All that a checkpoint must hold, by name."""
        dense = {f"adam/dense/{name}": slot for name, slot in self.dense_adam.slots().items()}
        rows = {f"adam/item_table/{name}": slot for name, slot in self.row_adam.slots().items()}
        weights = {f"model/{name}": variable for name, variable in self.model.weights_by_name().items()}
        return {**weights, **dense, **rows}

    def _step(self, rows: Any, *inputs: Any) -> dict[str, Any]:
        state, metrics = self._compiled(self.row_adam.gather(rows), rows, *inputs)
        self.row_adam.scatter(rows, state)
        return metrics  # type: ignore[no-any-return]

    def _update(
        self,
        row_state: tuple[Any, Any, Any],
        rows: Any,
        row_categories: Any,
        history: Any,
        positive: Any,
        negative: Any,
        positive_log_count: Any,
        negative_log_count: Any,
        learning_rate: Any,
        step: Any,
    ) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
        row_values = row_state[0]
        # Logits are log(p * items), the lift over uniform: a constant beside log p, which orders items alike
        # and lets the network, whose last layer has no bias, start at the answer's level. Without it the
        # first hundred gradients are 100 times larger than all later ones, and Adam's second moments then
        # hold the learning rate down for thousands of steps (no better than popularity after 500 steps).
        log_count = self._log_items + _candidates(
            positive_log_count[..., None], negative_log_count[:, None, :]
        )
        with tf.GradientTape() as tape:
            tape.watch(row_values)
            item_part = row_values * _present(rows)
            category_part = tf.gather(self.model.category_table.value, row_categories)
            inputs = tf.concat([item_part, category_part * _present(row_categories)], axis=-1)
            user = self.model.encode_history(tf.gather(inputs, history), training=True)
            positives, negatives = self._embed(inputs, positive, negative)
            hidden = _candidates(
                self.model.pair_hidden(user, positives), self.model.pair_hidden(user, negatives)
            )
            logits = self.model.tail(hidden, training=True)
            loss_xe = sampled_cross_entropy(logits, log_count)
            loss_adv = self._adversarial_loss(user, positives, negatives, log_count)
            loss = loss_xe + loss_adv
        names = sorted(self._dense)
        sources = [self._dense[name] for name in names]
        *gradients, row_gradient = tape.gradient(
            loss, [*sources, row_values], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        norm = tf.linalg.global_norm([*gradients, row_gradient])
        if self._clip_norm > 0:
            scale = tf.minimum(1.0, self._clip_norm / tf.maximum(norm, 1e-12))
            gradients = [gradient * scale for gradient in gradients]
            row_gradient = row_gradient * scale
        self.dense_adam.apply(dict(zip(names, gradients, strict=True)), learning_rate, step)
        state = self.row_adam.updated(row_state, row_gradient, learning_rate, step)
        return state, {
            "loss": loss,
            "loss_xe": loss_xe,
            "loss_adv": loss_adv,
            "acc": _accuracy(logits - log_count),
            "acc_origin": _accuracy(logits),
            "grad_norm": norm,
        }

    def _embed(self, inputs: Any, positive: Any, negative: Any) -> tuple[Any, Any]:
        """Positives [G, U, 1, D] and negatives [G, 1, C, D] through the item tower, in one pass."""
        candidates = tf.concat([tf.reshape(positive, [-1]), tf.reshape(negative, [-1])], axis=0)
        embedded = self.model.embed_items(tf.gather(inputs, candidates), training=True)
        n_positive, dim = positive.shape.num_elements(), embedded.shape[-1]
        positives = tf.reshape(embedded[:n_positive], [*positive.shape, 1, dim])
        return positives, tf.reshape(embedded[n_positive:], [negative.shape[0], 1, negative.shape[1], dim])

    def _adversarial_loss(self, user: dict[str, Any], positives: Any, negatives: Any, log_count: Any) -> Any:
        """The KL term, each (user, candidate) pair perturbed by itself, over the first `adv_groups` groups.

        Groups are random, so a few of them estimate the mean over all without bias.
        """
        if self._adv_eps == 0:
            return tf.zeros([])
        n = self._adv_groups
        user = {name: tensor[:n] for name, tensor in user.items()}
        frozen_user = {name: tf.stop_gradient(tensor) for name, tensor in user.items()}
        embeddings = _candidates(positives[:n], negatives[:n])
        with self.model.moments_kept():
            with tf.GradientTape() as tape:
                clean = tf.stop_gradient(embeddings)
                tape.watch(clean)
                logits = self.model.tail(self.model.pair_hidden(frozen_user, clean), training=True)
                loss_xe = sampled_cross_entropy(logits, log_count[:n])
            gradient = tape.gradient(loss_xe, clean)
            perturbed = adversarial_embeddings(embeddings, gradient, self._adv_eps)
            adversarial = self.model.tail(self.model.pair_hidden(user, perturbed), training=True)
        return kl_divergence(logits, adversarial)


def _candidates(positive: Any, negative: Any) -> Any:
    """Join [G, U, 1, …] and [G, U or 1, C, …] on the candidate axis, the positive first."""
    shape = tf.concat([tf.shape(positive)[:2], tf.shape(negative)[2:]], axis=0)
    return tf.concat([positive, tf.broadcast_to(negative, shape)], axis=2)


def _present(rows: Any) -> Any:
    return tf.cast(rows != 0, tf.float32)[:, None]


def _accuracy(logits: Any) -> Any:
    """Share of users whose positive beats every negative."""
    best_negative = tf.reduce_max(logits[..., 1:], axis=-1)
    return tf.reduce_mean(tf.cast(logits[..., 0] > best_negative, tf.float32))
