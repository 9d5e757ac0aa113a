"""Weights of NANN's dimensions, made by hand, and the model in NumPy float32: the oracle of the report.

The form is the folded one of `nann/offline/models/attention_dnn.py`; per pair

    w = softmax(item_query · user_keys + user_key_bias)                    attention over the history
    h = w · user_values + item_hidden                                      first dense layer
    score = dense 32 -> 1 (PReLU dense 64 -> 32 (PReLU dense 128 -> 64 (PReLU h)))

How the weights make a landscape with as many hills as a user has interests: item and history pass the
same layer PReLU([R, -R] x), from whose two halves R x itself can be restored, so that keys K make the
logits `sharpness` times the inner product of item and history item, and the attention picks the part of
the history that the item resembles. Half of the first layer's units are projections of the difference
between that part and the item, and negative slopes make them absolute values: a distance, which the upper
layers weigh down. The other half are random features of both, so that the nearest items are not the best
ones. Seeded noise lies on every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.offline.benchmark.gpu.corpus import DIM, HISTORY_LENGTH

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["HIDDEN_UNITS", "MULTIPLY_ADDS_A_PAIR", "SCORE_UNITS", "Weights", "make_weights"]

# reference/nann.md, "Model": units of the attention's first layers and of the score network.
HIDDEN_UNITS = 128
SCORE_UNITS = (128, 64, 32)
# Attention over the history (keys, values), then the three dense layers that are left per pair.
MULTIPLY_ADDS_A_PAIR = (
    HISTORY_LENGTH * (HIDDEN_UNITS + SCORE_UNITS[0])
    + SCORE_UNITS[0] * SCORE_UNITS[1]
    + SCORE_UNITS[1] * SCORE_UNITS[2]
    + SCORE_UNITS[2]
)
_SLOPE = 0.25  # of the layer that items and history items share
_ROWS_A_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Weights:
    """The folded model; a ``slope`` is its layer's PReLU, one for each unit."""

    query_kernel: Float32[np.ndarray, "64 128"]
    query_bias: Float32[np.ndarray, " 128"]
    query_slope: Float32[np.ndarray, " 128"]
    item_kernel: Float32[np.ndarray, "64 128"]
    item_bias: Float32[np.ndarray, " 128"]
    history_kernel: Float32[np.ndarray, "64 128"]
    history_bias: Float32[np.ndarray, " 128"]
    history_slope: Float32[np.ndarray, " 128"]
    key_kernel: Float32[np.ndarray, "128 128"]
    key_bias_kernel: Float32[np.ndarray, " 128"]
    value_kernel: Float32[np.ndarray, "64 128"]
    slope_1: Float32[np.ndarray, " 128"]
    kernel_2: Float32[np.ndarray, "128 64"]
    bias_2: Float32[np.ndarray, " 64"]
    slope_2: Float32[np.ndarray, " 64"]
    kernel_3: Float32[np.ndarray, "64 32"]
    bias_3: Float32[np.ndarray, " 32"]
    slope_3: Float32[np.ndarray, " 32"]
    kernel_4: Float32[np.ndarray, " 32"]

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights by name."""
        return asdict(self)

    def encode_items(self, embeddings: Float32[np.ndarray, "n 64"]) -> dict[str, np.ndarray]:
        """The item tensors of an artifact, in half precision: item_query and item_hidden, [n, 128]."""
        query = _prelu(embeddings @ self.query_kernel + self.query_bias, self.query_slope)
        hidden = embeddings @ self.item_kernel + self.item_bias
        return {"item_hidden": hidden.astype(np.float16), "item_query": query.astype(np.float16)}

    def encode_user(
        self, embeddings: Float32[np.ndarray, "N 64"], history: Int32[np.ndarray, " length"]
    ) -> dict[str, np.ndarray]:
        """The user tensors of one history: keys [128, L], key bias [1, L], values [L, 128]."""
        inputs = np.where(history[:, None] >= 0, embeddings[history], np.float32(0))
        hidden = _prelu(inputs @ self.history_kernel + self.history_bias, self.history_slope)
        return {
            "user_key_bias": (hidden @ self.key_bias_kernel)[None],
            "user_keys": np.ascontiguousarray((hidden @ self.key_kernel).T),
            "user_values": inputs @ self.value_kernel,
        }

    def score(
        self, user: Mapping[str, np.ndarray], items: Mapping[str, np.ndarray]
    ) -> Float32[np.ndarray, " items"]:
        """Scores of items (their tensors [n, 128]) for one user, in float32."""
        scores = np.empty(len(items["item_query"]), dtype=np.float32)
        for start in range(0, len(scores), _ROWS_A_CHUNK):
            rows = slice(start, start + _ROWS_A_CHUNK)
            logits = items["item_query"][rows].astype(np.float32) @ user["user_keys"] + user["user_key_bias"]
            attention = np.exp(logits - logits.max(axis=1, keepdims=True))
            attention /= attention.sum(axis=1, keepdims=True)
            hidden = attention @ user["user_values"] + items["item_hidden"][rows].astype(np.float32)
            hidden = _prelu(_prelu(hidden, self.slope_1) @ self.kernel_2 + self.bias_2, self.slope_2)
            scores[rows] = _prelu(hidden @ self.kernel_3 + self.bias_3, self.slope_3) @ self.kernel_4
        return scores


def make_weights(*, seed: int = 5, sharpness: float = 20.0, texture: float = 3.0) -> Weights:
    """Weights of a seed. `sharpness` scales the attention's logits, `texture` the random features."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    rotation = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    shared = np.concatenate([rotation, -rotation], axis=1) + normal(DIM, HIDDEN_UNITS, scale=0.04)
    shared_bias = normal(HIDDEN_UNITS, scale=0.05)
    slope = np.full(HIDDEN_UNITS, _SLOPE, np.float32)
    # PReLU(z) - PReLU(-z) = (1 + slope) z restores the rotated input from the halves of the layer.
    unit = np.eye(DIM, dtype=np.float32)
    restore = np.block([[unit, -unit], [-unit, unit]]) * np.float32(sharpness / (1 + _SLOPE) ** 2)
    half = SCORE_UNITS[0] // 2
    distance = normal(DIM, half, scale=1.0)
    features = normal(DIM, half, scale=texture)
    item_features = normal(DIM, half, scale=texture)
    second, third = SCORE_UNITS[1] // 2, SCORE_UNITS[2] // 2
    kernel_2 = normal(*SCORE_UNITS[:2], scale=SCORE_UNITS[0] ** -0.5)
    kernel_2[:half, :second] = -np.abs(normal(half, second, scale=0.125))
    kernel_2[:half, second:] *= 0.3
    kernel_2[half:, :second] *= 0.5
    kernel_3 = normal(*SCORE_UNITS[1:], scale=SCORE_UNITS[1] ** -0.5)
    kernel_3[:second, :third] = np.abs(kernel_3[:second, :third])
    kernel_4 = normal(SCORE_UNITS[2], scale=1 / 6)
    kernel_4[:third] = np.abs(kernel_4[:third])
    return Weights(
        query_kernel=shared,
        query_bias=shared_bias,
        query_slope=slope,
        item_kernel=np.concatenate([-distance, item_features], axis=1),
        item_bias=np.concatenate([np.zeros(half, np.float32), normal(half, scale=0.5 * texture)]),
        history_kernel=shared.copy(),
        history_bias=shared_bias.copy(),
        history_slope=slope.copy(),
        key_kernel=restore,
        key_bias_kernel=normal(HIDDEN_UNITS, scale=0.5),
        value_kernel=np.concatenate([distance, features], axis=1),
        slope_1=np.concatenate([np.full(half, -1), np.full(half, 0.1)]).astype(np.float32),
        kernel_2=kernel_2,
        bias_2=normal(SCORE_UNITS[1], scale=0.2),
        slope_2=np.repeat(np.array([0.8, 0.4], np.float32), second),
        kernel_3=kernel_3,
        bias_3=normal(SCORE_UNITS[2], scale=0.2),
        slope_3=np.repeat(np.array([0.8, 0.4], np.float32), third),
        kernel_4=kernel_4,
    )


def _prelu(inputs: np.ndarray, slope: np.ndarray) -> np.ndarray:
    outputs: np.ndarray = np.maximum(inputs, 0) + slope * np.minimum(inputs, 0)
    return outputs
