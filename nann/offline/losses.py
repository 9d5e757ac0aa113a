"""The two terms of the training loss (reference/nann.md, "Model"); the positive is candidate 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["kl_divergence", "sampled_cross_entropy"]


def sampled_cross_entropy(
    logits: Float32[Any, "*users candidates"], log_expected_count: Float32[Any, "*users candidates"]
) -> Float32[Any, ""]:
    """Sigmoid cross-entropy of `logits - log(expected count)`: summed over candidates, mean over users.

    Noise-contrastive estimation (Gutmann and Hyvärinen 2012): its minimum is logit = log p(item | user).
    """
    corrected = logits - log_expected_count
    positive = tf.nn.softplus(-corrected[..., 0])
    negative = tf.reduce_sum(tf.nn.softplus(corrected[..., 1:]), axis=-1)
    return tf.reduce_mean(positive + negative)


def kl_divergence(
    logits: Float32[Any, "*users candidates"], adversarial_logits: Float32[Any, "*users candidates"]
) -> Float32[Any, ""]:
    """KL(softmax(logits) ‖ softmax(adversarial logits)), mean over users; no gradient into `logits`."""
    log_p = tf.nn.log_softmax(tf.stop_gradient(logits))
    log_q = tf.nn.log_softmax(adversarial_logits)
    return tf.reduce_mean(tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1))
