"""The two layers every model here is made of, with the folded form that serving uses.

Weights keep the names of NANN's blocks (`fc`, `bn`, `prelu`; reference/nann.md, "Model").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["BATCH_NORM_EPSILON", "DenseBlock", "FoldedDense", "prelu"]

# TF1's tf.layers defaults, which NANN's network was trained with (reference/nann.md, "Model").
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99
# He et al. 2015 (the PReLU paper), section 2.1.
PRELU_INITIAL_SLOPE = 0.25


def prelu(inputs: Any, slope: Any) -> Any:
    """max(x, 0) + slope * min(x, 0), one slope for each entry of the last axis."""
    return tf.maximum(inputs, 0.0) + slope * tf.minimum(inputs, 0.0)


@dataclass(frozen=True, slots=True)
class FoldedDense:
    """A dense layer into which batch norm has been folded; `slope` is absent without a PReLU."""

    kernel: Float32[np.ndarray, "inputs units"]
    bias: Float32[np.ndarray, " units"]
    slope: Float32[np.ndarray, " units"] | None


class DenseBlock(keras.layers.Layer):  # type: ignore[misc]
    """Dense, then batch norm and PReLU where asked for.

    Batch norm takes its moments over every axis but the last, so a pair of (user, candidate)
    counts as one example whatever the leading shape.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        *,
        name: str,
        seed: int,
        norm: bool = False,
        activate: bool = True,
        use_bias: bool = True,
    ) -> None:
        super().__init__(name=name)
        self.norm, self.activate, self.use_bias = norm, activate, use_bias
        self.keeps_moments = False
        glorot = keras.initializers.GlorotUniform(seed=seed)
        self.kernel = self.add_weight(shape=(inputs, units), initializer=glorot, name="fc_kernel")
        self.bias = self.add_weight(shape=(units,), name="fc_bias", initializer="zeros") if use_bias else None
        if norm:
            self.gamma = self.add_weight(shape=(units,), initializer="ones", name="bn_gamma")
            self.beta = self.add_weight(shape=(units,), initializer="zeros", name="bn_beta")
            self.moving_mean = self.add_weight(
                shape=(units,), initializer="zeros", trainable=False, name="bn_moving_mean"
            )
            self.moving_variance = self.add_weight(
                shape=(units,), initializer="ones", trainable=False, name="bn_moving_variance"
            )
        if activate:
            slope = keras.initializers.Constant(PRELU_INITIAL_SLOPE)
            self.slope = self.add_weight(shape=(units,), initializer=slope, name="prelu")
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Apply the whole block to [..., inputs]."""
        outputs = _matmul(inputs, self.kernel)
        return self.finish(outputs + self.bias if self.use_bias else outputs, training)

    def finish(self, pre_activation: Any, training: bool = False) -> Any:
        """Batch norm and PReLU alone, for a `pre_activation` [..., units] made elsewhere.

        In training the moving moments are updated as a side effect, unless `keeps_moments` is set.
        """
        outputs = pre_activation
        if self.norm:
            scale, shift = self._scale_and_shift(outputs, training)
            outputs = outputs * scale + shift
        return prelu(outputs, self.slope) if self.activate else outputs

    def _scale_and_shift(self, inputs: Any, training: bool) -> tuple[Any, Any]:
        if training:
            # One pass for both moments; shifting by the moving mean keeps the difference of squares exact.
            axes = list(range(inputs.shape.rank - 1))
            origin = tf.stop_gradient(tf.convert_to_tensor(self.moving_mean))
            centred = inputs - origin
            offset = tf.reduce_mean(centred, axes)
            variance = tf.maximum(tf.reduce_mean(tf.square(centred), axes) - tf.square(offset), 0.0)
            mean = origin + offset
            if not self.keeps_moments:
                self._update_moments(tf.stop_gradient(mean), tf.stop_gradient(variance))
        else:
            mean = tf.convert_to_tensor(self.moving_mean)
            variance = tf.convert_to_tensor(self.moving_variance)
        scale = self.gamma * tf.math.rsqrt(variance + BATCH_NORM_EPSILON)
        return scale, self.beta - mean * scale

    def _update_moments(self, mean: Any, variance: Any) -> None:
        keep = BATCH_NORM_MOMENTUM
        self.moving_mean.assign(keep * self.moving_mean + (1 - keep) * mean)
        self.moving_variance.assign(keep * self.moving_variance + (1 - keep) * variance)

    def folded(self) -> FoldedDense:
        """The block at inference as one dense layer and a slope (float64 inside, float32 out)."""
        kernel = _to_float64(self.kernel)
        bias = _to_float64(self.bias) if self.use_bias else np.zeros(kernel.shape[1])
        if self.norm:
            scale = _to_float64(self.gamma) / np.sqrt(_to_float64(self.moving_variance) + BATCH_NORM_EPSILON)
            kernel = kernel * scale
            bias = (bias - _to_float64(self.moving_mean)) * scale + _to_float64(self.beta)
        slope = _to_float64(self.slope).astype(np.float32) if self.activate else None
        return FoldedDense(kernel.astype(np.float32), bias.astype(np.float32), slope)


def _matmul(inputs: Any, kernel: Any) -> Any:
    """[..., n] x [n, m] as one flat matrix product, which is faster than a batched one."""
    kernel = tf.convert_to_tensor(kernel)
    flat = tf.reshape(inputs, [-1, kernel.shape[0]])
    shape = tf.concat([tf.shape(inputs)[:-1], [kernel.shape[1]]], axis=0)
    outputs = tf.reshape(tf.matmul(flat, kernel), shape)
    outputs.set_shape([*inputs.shape[:-1], kernel.shape[1]])
    return outputs


def _to_float64(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
